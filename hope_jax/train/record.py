"""What a run writes down: ``metrics.jsonl`` (a row for each event) and TensorBoard events.

Rows are ``{"step", "tokens", "split": "train" | "heldout", ...means}``, ``step`` counting batches trained on; a mean
that is not finite, as of a skipped step, is null. A resumed run drops the rows beyond the restored step, so the file
reads as if the run had never stopped. Read ``loop.py`` next.
"""

import contextlib
import json
import math
import os
import re
import socket
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar
from tqdm import tqdm

from hope_jax.errors import UserError

METRICS_FILE = "metrics.jsonl"
OF_EVERY_ROW = ("step", "tokens", "split")

Row = dict[str, Any]
Means = Mapping[str, float]


def read_rows(path: Path, needed: Collection[str] = OF_EVERY_ROW) -> list[Row]:
    """The rows of a file of JSON lines in order; none if it is missing. A last line cut by a kill is left out.

    Raises UserError, naming the line, where any other is not a JSON object with the ``needed`` names.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    *lines, torn = text.split("\n")
    if _lacks(torn, needed) is None:
        lines.append(torn)
    for number, line in enumerate(lines, 1):
        if (problem := _lacks(line, needed)) is not None:
            raise UserError(f"Line {number} of {path} {problem}: {line[:80]!r}; mend or delete that line.")
    return [json.loads(line) for line in lines]


def _lacks(line: str, needed: Collection[str]) -> str | None:
    """Why a line is no row; None if it is one."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return "is not JSON"
    absent = [name for name in needed if not isinstance(row, dict) or name not in row]
    return f"has no {', '.join(absent)}" if absent else None


def median_speed(folder: Path) -> float:
    """Tokens per second of a run in training, the median over its steps; 0 if it has none."""
    rows = [row for row in read_rows(folder / METRICS_FILE) if row["split"] == "train"]
    return statistics.median(row["tokens_per_second"] for row in rows) if rows else 0.0


class Record(contextlib.AbstractContextManager["Record"]):
    """The open logs of a run that has done ``step`` steps; a context manager. At step 0 they begin empty.

    ``heldout``: the means over held-out batches by step. ``folder``: of the run; None: nothing is written, and
    ``heldout`` begins with ``measured``.
    """

    def __init__(self, folder: Path | None, step: int, measured: Mapping[int, Means] | None = None):
        self.heldout: dict[int, Means] = dict(measured or {})
        self._file, self._board = None, None
        if folder is None:
            return
        path = folder / METRICS_FILE
        kept = [row for row in read_rows(path) if row["step"] <= step] if step else []
        for row in kept:
            if row["split"] == "heldout":
                self.heldout[row["step"]] = {name: row[name] for name in row if name not in OF_EVERY_ROW}
        part = path.with_suffix(".part")  # a kill leaves either the old file or the new one
        part.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(part, path)
        self._file, self._board = path.open("a"), Board(folder / "tensorboard", step + 1 if step else 0)

    def __exit__(self, *error: object) -> None:
        if self._file and self._board:
            with contextlib.closing(self._board):  # on a full disk this fails, too
                self._file.close()

    def add(self, step: int, tokens: int, split: str, means: Means) -> None:
        """One row, on disk when this returns."""
        if split == "heldout":
            self.heldout[step] = dict(means)
        if self._file and self._board:
            known = {name: value for name, value in means.items() if math.isfinite(value)}
            row = {"step": step, "tokens": tokens, "split": split, **dict.fromkeys(means), **known}
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            self._board.add(step, {f"{split}/{name}": value for name, value in known.items()})


def _later_than_all(folder: Path) -> float:
    """Seconds since 1970, later than those in all names of files: TensorBoard reads files in that order."""
    names = (re.match(r"events\.out\.tfevents\.(\d+\.\d+)\.", path.name) for path in folder.iterdir())
    return max([time.time(), *(float(name[1]) + 1e-6 for name in names if name)])


class Board:
    """TensorBoard events of a run, written by the thread that adds them: another thread could die unseen.

    ``start`` is the first step to come; TensorBoard hides what an earlier attempt wrote from there on. When the disk
    refuses an event, one sentence says so and no more are written: the rows of the record are what counts.
    """

    def __init__(self, folder: Path, start: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, now = folder, _later_than_all(folder)
        name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}"
        self._writer: RecordWriter | None = RecordWriter(str(folder / name))
        session = SessionLog(status=SessionLog.START)
        version = Event(wall_time=now, file_version="brain.Event:2")
        self._write([version, Event(wall_time=now, step=start, session_log=session)])

    def add(self, step: int, values: Means) -> None:
        """One event per number, on disk when this returns: TensorBoard follows a run that goes on."""
        now = time.time()
        self._write([Event(wall_time=now, step=step, summary=scalar(name, x)) for name, x in values.items()])

    def close(self) -> None:
        """Everything on disk."""
        self._try(RecordWriter.close)

    def _write(self, events: list[Event]) -> None:
        self._try(lambda writer: [*(writer.write(event.SerializeToString()) for event in events), writer.flush()])

    def _try(self, action: Callable[[RecordWriter], object]) -> None:
        if (writer := self._writer) is None:
            return
        try:
            action(writer)
        except OSError as error:
            self._writer = None
            why = error.strerror or error
            tqdm.write(f"No more TensorBoard events in {self._folder}: {why}.", file=sys.stderr)
            with contextlib.suppress(OSError):  # closing tries to write once more
                writer.close()
