"""Results of experiments: files of JSON lines that many processes append to, and runs that can be stopped.

A line is one result, whole even after a kill or a full disk. Read ``plots.py`` next.
"""

import fcntl
import hashlib
import json
import math
import shutil
import statistics
import sys
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from hope_jax import train as training
from hope_jax.errors import UserError

Row = dict[str, Any]


class Results:
    """The lines of an experiment, one for each finished run, and the folders of runs that were stopped.

    Args:
      folder: of ``<name>.jsonl``.
      name: of the experiment.
      cache: where unfinished runs are kept.
      needed: what every line must have.

    Raises:
      UserError: nothing can be written there, or a line is damaged: better known now than after training.
    """

    def __init__(self, folder: Path, name: str, cache: Path, needed: Sequence[str] = ()):
        self.path = open_results(folder, f"{name}.jsonl")
        self._runs, self._needed = cache / "runs" / name, needed
        self.rows()

    def rows(self) -> list[Row]:
        """All lines, in the order they were written."""
        return training.read_rows(self.path, self._needed)

    def complete(self, setting: Row, work: Callable[[training.Run], Row]) -> Row:
        """The line of the run of ``setting``: the last one on file, or ``setting | work(run)``, which is written down.

        ``work`` trains in the folder of ``run``. When it is stopped the folder stays, and the next call goes on from
        there; it is removed when the line is on file.
        """
        text = json.dumps(setting, sort_keys=True)
        if found := [row for row in self.rows() if row | json.loads(text) == row]:
            return found[-1]
        with training.open_run(self._runs / hashlib.sha256(text.encode()).hexdigest()[:16]) as folder:
            row = setting | work(training.Run(folder, {"setting": text}))
            append(self.path, row)
        shutil.rmtree(folder, ignore_errors=True)
        return row


def open_results(folder: Path, name: str, flag: str = "--results") -> Path:
    """The file in ``folder``, made if needed. Raises UserError, naming ``flag``, where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).open("ab").close()
    except OSError as error:
        raise UserError(f"Cannot write {folder / name}: {error.strerror or error}; choose another {flag}.") from error
    return folder / name


def append(path: Path, row: Row) -> None:
    """One JSON line at the end of a file, after whatever another process is writing or was stopped in writing."""
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _end_last_line(file)
        file.write(json.dumps(row).encode() + b"\n")


def _end_last_line(file: BinaryIO) -> None:
    """A line without its end gets it if it is whole; otherwise its result was lost to a kill, and the rest goes too."""
    file.seek(0)
    last = file.read().rpartition(b"\n")[2]
    if not last:
        return
    try:
        json.loads(last)
    except ValueError:
        file.truncate(file.tell() - len(last))
        print(f"The last line of {file.name} was cut off and has been removed: {last[:80]!r}", file=sys.stderr)
    else:
        file.write(b"\n")


def settings(lines: Sequence[Row], run: Callable[[Row], Hashable]) -> list[dict[Any, dict[int, Row]]]:
    """For each ``setting`` on file, the one run last at the end: what ``run`` says -> seed -> its last line."""
    found: dict[str, dict[Any, dict[int, Row]]] = {}
    for line in lines:
        same = json.dumps(line["setting"], sort_keys=True)
        found[same] = found.pop(same, {})
        found[same].setdefault(run(line), {})[line["seed"]] = line
    return list(found.values())


def deviation(values: Sequence[float]) -> float:
    """Standard deviation over seeds, which are a sample (n - 1 below); of a single one it is not known, NaN."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def spread(values: Sequence[float]) -> str:
    """Mean and deviation as text; "-" where one of the values is not known."""
    return "-" if any(map(math.isnan, values)) else f"{statistics.mean(values):.3f} +- {deviation(values):.3f}"
