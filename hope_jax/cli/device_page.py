"""The rows of ``device_check.py`` as a page of Markdown."""

from collections.abc import Sequence
from typing import Any

from hope_jax.cli.kernel_table import REASONS, cells, losses, name
from hope_jax.cli.results import Row
from hope_jax.cli.trials import grouped

TRAINING = {
    "model": "model",
    "length": "tokens",
    "batch": "batch",
    "tokens_per_second": "tokens/s",
    "step_ms": "ms per step",
    "steps": "steps after the first",
    "mfu": "MFU",
    "tflops": "TFLOP/s",
    "gb": "GB",
    "compile_seconds": "s to compile",
}


def page(rows: Sequence[Row]) -> str:
    """All that a run found; what failed comes last."""
    device, version = next(((row["device"], row["jax"]) for row in rows if "device" in row), ("no device", "not known"))
    parts, trained = grouped(rows, lambda row: row["part"]), [row for row in rows if "tokens_per_second" in row]
    of_layers, graphs = ([row for row in parts.get(part, []) if "impl" in row] for part in ("kernels", "graphs"))
    said = [f"# {device}, jax {version}", "", "`python -m experiments gpu_check`", ""]
    said += _section("Distance from float64, token by token", _exactness(parts.get("exactness", [])))
    said += _section("Training in bfloat16", _columns(trained, TRAINING))
    said += _section("Layers, in float32", cells(of_layers))
    said += _section("Layers whose loops are CUDA graphs", cells(graphs))
    said += _listed("Where we lose", losses(of_layers))
    for key, label in REASONS.items():
        lines = [f"{row['part']} {_what(row)}: {row[key]}" for row in rows if key in row]
        said += _listed(f"What {label}", lines)
    return "\n".join(said).rstrip() + "\n"


def _exactness(rows: Sequence[Row]) -> list[list[Any]]:
    known = [row for row in rows if "right" in row]
    numbers = [[f"{row[key]:.1e}" for key in ("reads", "gradients")] for row in known]
    words = ["right" if row["right"] else "**wrong**" for row in known]
    lines = [
        [row["memory"], row["impl"], *number, word] for row, number, word in zip(known, numbers, words, strict=True)
    ]
    return [["memory", "form", "reads", "gradients", ""], *lines]


def _columns(rows: Sequence[Row], columns: dict[str, str]) -> list[list[Any]]:
    return [
        list(columns.values()),
        *([row[key] if row.get(key) is not None else "-" for key in columns] for row in rows),
    ]


def _section(title: str, lines: Sequence[Sequence[Any]]) -> list[str]:
    """A table under its title; nothing where no row is known."""
    if len(lines) < 2:
        return []
    head, *rest = ("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return [f"**{title}**", "", head, "|---" * len(lines[0]) + "|", *rest, ""]


def _listed(title: str, lines: Sequence[str]) -> list[str]:
    return [f"**{title}**", "", *(f"* {line}" for line in lines), ""] if lines else []


def _what(row: Row) -> str:
    if "chip" in row:
        return name(row)
    return " ".join(str(row[key]) for key in ("memory", "impl", "model", "batch") if key in row)
