"""The folder of a run: one writer at a time, writable before training starts, and belonging to one configuration.

Read ``checkpoint.py`` next: it fills the folder.
"""

import contextlib
import dataclasses
import fcntl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from hope_jax.errors import UserError
from hope_jax.train.checkpoint import FOLDER
from hope_jax.train.record import METRICS_FILE

LOCK_FILE = ".lock"


@contextlib.contextmanager
def open_run(folder: Path) -> Iterator[Path]:
    """Create or reopen a run folder and hold it for this process.

    Raises:
        UserError: it cannot be written, holds something that is not a run, or another process trains in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(folder)
        # A whole block, so that a full disk is noticed and not only a forbidden one.
        (folder / LOCK_FILE).write_bytes(b"\0" * 4096)
        lock = (folder / LOCK_FILE).open("r+b")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"The run folder {folder} cannot be written ({reason}); choose another --run.") from error
    with lock:
        hold(lock, f"Another process is training in {folder}; wait for it or choose another --run.")
        yield folder


def hold(lock: BinaryIO, busy: str) -> None:
    """Lock a file until it is closed. Raises UserError, saying ``busy``, where another process has."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(busy) from error


def _refuse_foreign(folder: Path) -> None:
    known = {LOCK_FILE, FOLDER, METRICS_FILE}
    inside = {path.name for path in folder.iterdir()}
    if inside and not inside & known:
        raise UserError(f"The folder {folder} holds {min(inside)} but no run; choose an empty or new --run folder.")


def flatten(config: Any, prefix: str) -> dict[str, Any]:
    """A configuration as JSON: dotted field name -> number, text or list, through nested dataclasses and tuples."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        pairs = [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]
    elif isinstance(config, Mapping):
        pairs = [(str(key), value) for key, value in config.items()]
    elif isinstance(config, tuple | list) and any(map(dataclasses.is_dataclass, config)):
        pairs = [(str(index), value) for index, value in enumerate(config)]
    else:
        return {prefix: _plain(config)}
    flat = [flatten(value, f"{prefix}.{name}" if prefix else name) for name, value in pairs]
    return {name: value for part in flat for name, value in part.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    # Functions and types by name: their repr may carry an address.
    return getattr(value, "__name__", None) or str(value)


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to continue a run with another configuration.

    Raises:
        UserError: naming every field that differs, with both values.
    """
    absent = "absent"
    differing = [
        f"{name} is {saved.get(name, absent)} there and {now.get(name, absent)} here"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name, absent) != now.get(name, absent)
    ]
    if differing:
        raise UserError(
            f"The run folder {folder} belongs to another configuration: {'; '.join(differing)}. Use the same values to "
            "continue it or another --run to start anew."
        )
