"""What a run writes down: ``metrics.jsonl`` (one row per event), TensorBoard events, the loss curve.

Rows are ``{"step", "tokens", "split": "train" | "heldout", ...means}``, ``step`` counting updates done. A resumed run
drops the rows beyond the restored step, so the file reads as if the run had never stopped. Read ``loop.py`` next.
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tensorboardX import SummaryWriter

from hope_jax.errors import UserError

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"

Row = dict[str, Any]


def read_rows(path: Path, needed: Collection[str] = ("step", "tokens", "split", "bits_per_byte")) -> list[Row]:
    """The rows of a file of JSON lines in order; none if it is missing. A last line cut by a kill is left out.

    Raises:
        UserError: any other line is not a JSON object with the ``needed`` names.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    whole, _, torn = text.rpartition("\n")
    lines = whole.split("\n") if whole else []
    if _lacks(torn, needed) is None:
        lines.append(torn)
    for number, line in enumerate(lines, 1):
        if (problem := _lacks(line, needed)) is not None:
            raise UserError(f"Line {number} of {path} {problem}: {line[:80]!r}; mend or delete that line.")
    return [json.loads(line) for line in lines]


def _lacks(line: str, needed: Collection[str]) -> str | None:
    """What keeps a line from being a row; None if nothing does."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return "is not JSON"
    absent = [name for name in needed if not isinstance(row, dict) or name not in row]
    return f"has no {', '.join(absent)}" if absent else None


class Record:
    """The open logs of a run that stands at ``step``, empty if that is 0; a context manager."""

    def __init__(self, folder: Path, step: int):
        self._path = folder / METRICS_FILE
        kept = [row for row in read_rows(self._path) if row["step"] <= step] if step else []
        _replace(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self.heldout = {row["step"]: row["bits_per_byte"] for row in kept if row["split"] == "heldout"}
        self._file = self._path.open("a")
        # Its queue has no bound: on a full disk its thread dies, and we would wait for room in the queue for ever.
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0, max_queue=0)

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._board.close()

    def add(self, step: int, tokens: int, split: str, means: Mapping[str, float]) -> None:
        """One row, on disk when this returns."""
        self._file.write(json.dumps({"step": step, "tokens": tokens, "split": split, **means}) + "\n")
        self._file.flush()
        if split == "heldout":
            self.heldout[step] = means["bits_per_byte"]
        for name, value in means.items():
            self._board.add_scalar(f"{split}/{name}", value, step)


def _replace(path: Path, text: str) -> None:
    """Write ``text`` so that a kill leaves either the old file or the new one."""
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def draw_curve(folder: Path, title: str) -> Path:
    """Train and held-out bits per byte against tokens, from the metrics file, as a PNG; its path."""
    rows = read_rows(folder / METRICS_FILE)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for split, style in {"train": {"linewidth": 0.8, "alpha": 0.7}, "heldout": {"marker": "o"}}.items():
        points = [(row["tokens"], row["bits_per_byte"]) for row in rows if row["split"] == split]
        axes.plot(*zip(*points, strict=True), label=split, **style) if points else None
    axes.set(xlabel="tokens", ylabel="bits per byte", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / CURVE_FILE, dpi=120)
    return folder / CURVE_FILE
