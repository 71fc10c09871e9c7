"""Results of experiments: files of JSON lines that many processes append to, and runs that can be stopped.

A line is one result, whole even after a kill or a full disk. Read ``plots.py`` next.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import shutil
import statistics
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from hope_jax import train as training
from hope_jax.errors import UserError

Row = dict[str, Any]


class Results:
    """The lines of an experiment, one for each finished run, and the folders of runs that were stopped.

    ``folder``: of the file ``<name>.jsonl``. ``cache``: where unfinished runs are kept. ``needed``: names that every
    line must have. ``only_read``: nothing will be written.

    Raises UserError, before anything is trained, where the file cannot be written, where a line is damaged, and where
    there is nothing to read with ``only_read``.
    """

    def __init__(self, folder: Path, name: str, cache: Path, needed: Sequence[str] = (), only_read: bool = False):
        self.path = folder / f"{name}.jsonl" if only_read else open_results(folder, f"{name}.jsonl")
        self._runs, self._needed = cache / "runs" / name, needed
        if not self.rows() and only_read:
            raise UserError(f"There is nothing in {self.path}; run something or name another --results.")

    def rows(self) -> list[Row]:
        """All lines, in the order they were written."""
        return training.read_rows(self.path, self._needed)

    def complete(self, setting: Row, work: Callable[[training.Run], Row]) -> Row:
        """The line of the run of ``setting``: the last one on file, or else ``setting | work(run)``, which is appended.

        ``work`` trains in the folder of ``run``. When it is stopped the folder stays, and the next call goes on from
        there; it is removed when the line is on file.
        """
        if found := [row for row in self.rows() if row | json.loads(_text(setting)) == row]:
            return found[-1]
        with self._run(setting) as run:
            row = setting | work(run)
            append(self.path, row)
        shutil.rmtree(run.folder, ignore_errors=True)
        return row

    @contextlib.contextmanager
    def shared(self, setting: Row, work: Callable[[training.Run], Any]) -> Iterator[Callable[[], Any]]:
        """The result of ``work(run)`` for several lines that need it; it is computed when it is first asked for.

        Its folder stays until the block is left without an error: a run that was stopped goes on, and one that has
        finished is only read.
        """

        @functools.cache
        def found() -> Any:
            with self._run(setting) as run:
                return work(run)

        yield found
        shutil.rmtree(self._folder(setting), ignore_errors=True)

    @contextlib.contextmanager
    def _run(self, setting: Row) -> Iterator[training.Run]:
        with training.open_run(self._folder(setting), "--cache") as folder:
            yield training.Run(folder, {"setting": _text(setting)})

    def _folder(self, setting: Row) -> Path:
        return self._runs / hashlib.sha256(_text(setting).encode()).hexdigest()[:16]


def experiment(
    config: Any,
    name: str,
    needed: Sequence[str],
    work: Callable[[Any, Results], Any],
    table: Callable[[Sequence[Row]], list[str]],
    draw: Callable[[Any, Sequence[Row]], Path | None] | None = None,
) -> int:
    """Do the runs of ``config`` that are not on file (none with ``--table``), print and draw all; the exit status."""
    results = Results(config.results, name, config.cache, needed, config.table)
    if not config.table:
        work(config, results)
    print("\n".join(table(lines := results.rows())))
    figure = draw(config, lines) if draw else None
    if draw and figure is None:
        print("There is nothing on file with these flags.")
    print("written: " + ", ".join(str(path) for path in (results.path, figure) if path))
    return 0


def _text(setting: Row) -> str:
    return json.dumps(setting, sort_keys=True)


def open_results(folder: Path, name: str, flag: str = "--results") -> Path:
    """The file in ``folder``, made if needed. Raises UserError, naming ``flag``, where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).open("ab").close()
    except OSError as error:
        raise UserError(f"Cannot write {folder / name}: {error.strerror or error}; choose another {flag}.") from error
    return folder / name


def append(path: Path, row: Row) -> None:
    """Append one JSON line to a file, to which others may be writing, or may have been killed while they wrote."""
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _end_last_line(file)
        file.write(json.dumps(row).encode() + b"\n")


def _end_last_line(file: BinaryIO) -> None:
    """End the last line if that is missing. A line that is not whole JSON was cut off by a kill, and is removed."""
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


def settings(lines: Sequence[Row], run: Callable[[Row], Hashable]) -> list[tuple[Row, dict[Any, dict[int, Row]]]]:
    """The settings on file, the last used one at the end, each with its runs: ``run(line)`` -> seed -> last line."""
    found: dict[str, tuple[Row, dict[Any, dict[int, Row]]]] = {}
    for line in lines:
        same = _text(line["setting"])
        found[same] = found.pop(same, (line["setting"], {}))
        found[same][1].setdefault(run(line), {})[line["seed"]] = line
    return list(found.values())


def heading(setting: Row) -> str:
    """A setting as one line."""
    return ", ".join(f"{name} {value}" for name, value in setting.items())


def deviation(values: Sequence[float]) -> float:
    """Standard deviation over seeds, which are a sample (divided by n - 1); NaN for a single one."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and deviation as text, each in this format; "-" where one of the values is not known.

    A single value has no deviation.
    """
    if not values or any(map(math.isnan, values)):
        return "-"
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} +- {deviation(values):{form}}"


def aligned(rows: Sequence[Sequence[Any]]) -> list[str]:
    """A table as lines: the first column starts at the left, the others end at the right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    form = "  ".join([f"{{!s:<{widths[0]}}}", *(f"{{!s:>{width}}}" for width in widths[1:])])
    return [form.format(*row) for row in rows]
