"""The costs of layers as a table, and where a memory or one of its forms loses."""

from collections.abc import Sequence
from typing import Any

from hope_jax.cli.results import Row, aligned
from hope_jax.cli.trials import grouped

COLUMNS = {
    "memory": "memory",
    "chunk": "chunk",
    "head_size": "head",
    "length": "tokens",
    "batch": "batch",
    "impl": "impl",
    "forward_ms": "ms forward",
    "both_ms": "ms both",
    "gflops": "GFLOP/s",
    "gb_per_second": "GB/s",
    "launches": "launches",
    "moved_mb": "MB moved",
    "temporary_mb": "MB besides",
    "compile_seconds": "s to compile",
}
"""Key of a row -> heading. "both": forward and backward."""
MEASURES = {"both_ms": "time", "temporary_mb": "temporary memory"}


def cells(rows: Sequence[Row]) -> list[list[Any]]:
    """Headings and rows; "-" where a number is not known. What failed is not in it."""
    known = [row for row in rows if "failed" not in row]
    return [list(COLUMNS.values()), *([row.get(key) or "-" for key in COLUMNS] for row in known)]


def table(lines: Sequence[Row]) -> list[str]:
    """The ``rows`` of all lines by chip, what failed and why, then where a form or a memory loses."""
    said, rows = [], [row for line in lines for row in line["rows"]]
    for chip, same in grouped(rows, lambda row: row["chip"]).items():
        said += [chip, *aligned(cells(same))]
        said += [f"failed: {name(row)}: {row['failed']}" for row in same if "failed" in row]
        said += ["Where we lose:", *(losses(same) or ["nowhere"]), ""]
    return said


def losses(rows: Sequence[Row]) -> list[str]:
    """Which rows take more than the best form of their memory, and which of these more than attention, and how much.

    Rows that were timed are compared by time, compiled ones by temporary memory.
    """
    said = []
    for key, what in MEASURES.items():
        known = [row for row in rows if key in row and (key == "both_ms" or "both_ms" not in row)]
        for same in grouped(known, lambda row: (row["head_size"], row["length"], row["heads"], row["batch"])).values():
            said += _losses(same, key, what)
    return said


def _losses(rows: Sequence[Row], key: str, what: str) -> list[str]:
    """Of layers that read the same."""
    best = {of: min(forms, key=lambda row: row[key]) for of, forms in grouped(rows, _of).items()}
    pairs = [(row, best[_of(row)]) for row in rows if row is not best[_of(row)]]
    attention = next((row for row in rows if row["memory"] == "attention"), None)
    pairs += [(row, attention) for row in best.values() if attention is not None and row is not attention]
    ratios = [(row[key] / other[key], row, other) for row, other in pairs if row[key] > other[key] > 0]
    return [f"{name(row)}: {ratio:.2f} times the {what} of {_short(other)}" for ratio, row, other in ratios]


def _of(row: Row) -> tuple[Any, ...]:
    return row["memory"], row["chunk"]


def name(row: Row) -> str:
    """What a row is called in a sentence."""
    return f"{_short(row)}, {row['batch']} x {row['length']:,} tokens, heads of {row['head_size']}"


def _short(row: Row) -> str:
    return f"{row['memory']}{'' if row['chunk'] is None else ' ' + str(row['chunk'])} ({row['impl']})"
