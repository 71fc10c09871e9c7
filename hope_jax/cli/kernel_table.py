"""The costs of layers as a table, and where a memory or one of its forms loses."""

from collections.abc import Sequence
from typing import Any

from hope_jax.cli.measuring import did_not_fit
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
    "reads": "error of reads",
    "gradients": "of gradients",
}
"""Key of a row -> heading. "both": forward and backward."""
ERRORS = ("reads", "gradients")  # columns that are left out where no row has them
SHAPE = ("head_size", "length", "heads", "batch")
REASONS = {"not_counted": "was not counted", "failed": "failed"}
"""Key of a row with a reason -> what the reason explains. A program that cannot be read is timed all the same."""
MEASURES = {"both_ms": "time", "temporary_mb": "temporary memory"}


def cells(rows: Sequence[Row]) -> list[list[Any]]:
    """Headings and rows; "-" where a number is not known. What failed is not in it."""
    known = [row for row in rows if "failed" not in row]
    keys = [key for key in COLUMNS if key not in ERRORS or any(key in row for row in known)]
    return [[COLUMNS[key] for key in keys], *([_cell(row, key) for key in keys] for row in known)]


def _cell(row: Row, key: str) -> Any:
    return f"{row[key]:.1e}" if key in ERRORS and key in row else row.get(key) or "-"


def last(rows: Sequence[Row]) -> list[Row]:
    """The last row of each layer and form."""
    return list({(*_of(row), *(row[key] for key in SHAPE), row["impl"]): row for row in rows}.values())


def table(lines: Sequence[Row]) -> list[str]:
    """For each chip a table of its rows, what failed and why, and where a form or a memory loses."""
    said, rows = [], [row for line in lines for row in line["rows"]]
    for chip, all_of_it in grouped(rows, lambda row: row["chip"]).items():
        same = last(all_of_it)
        said += [chip, *aligned(cells(same))]
        for key, label in REASONS.items():
            said += [f"{label}: {name(row)}: {row[key]}" for row in same if key in row]
        said += ["Where we lose:", *(losses(same) or ["nowhere"]), ""]
    return said


def losses(rows: Sequence[Row]) -> list[str]:
    """Which forms take more than the best form of their memory, which best forms more than attention, and how much.

    Rows that were timed are compared by time, compiled ones by temporary memory.
    """
    said, done = [], [row for row in rows if "failed" not in row]
    for key, what in MEASURES.items():
        known = [row for row in done if key in row and (key == "both_ms" or "both_ms" not in row)]
        for same in grouped(known, lambda row: tuple(row[name] for name in SHAPE)).values():
            said += _losses(same, key, what)
    failed = [row for row in rows if "failed" in row and row["memory"] == "attention"]
    return said + [f"attention {'did not fit' if did_not_fit(row) else 'failed'}: {name(row)}" for row in failed]


def _losses(rows: Sequence[Row], key: str, what: str) -> list[str]:
    """``losses`` among layers that read inputs of one shape."""
    best = {of: min(forms, key=lambda row: row[key]) for of, forms in grouped(rows, _of).items()}
    pairs = [(row, best[_of(row)]) for row in rows if row is not best[_of(row)]]
    attention = next((row for row in rows if row["memory"] == "attention"), None)
    pairs += [(row, attention) for row in best.values() if attention is not None and row is not attention]
    ratios = [(row[key] / other[key], row, other) for row, other in pairs if row[key] > other[key] > 0]
    return [f"{name(row)}: {ratio:.2f} times the {what} of {_short(other)}" for ratio, row, other in ratios]


def _of(row: Row) -> tuple[Any, ...]:
    return row["memory"], row["chunk"]


def name(row: Row) -> str:
    """The name of a row in a sentence."""
    return f"{_short(row)}, {row['batch']} x {row['length']:,} tokens, heads of {row['head_size']}"


def _short(row: Row) -> str:
    return f"{row['memory']}{'' if row['chunk'] is None else ' ' + str(row['chunk'])} ({row['impl']})"
