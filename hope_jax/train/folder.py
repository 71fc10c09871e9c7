"""The folder of a run while it trains: one writer at a time, writable before training starts, seen by all processes."""

import contextlib
import functools
import secrets
from collections.abc import Iterator
from pathlib import Path

from hope_jax.errors import UserError
from hope_jax.storage.locks import locked
from hope_jax.train.checkpoint import FOLDER
from hope_jax.train.processes import found_by_first, seen_by_all
from hope_jax.train.record import METRICS_FILE
from hope_jax.train.run import CONFIG_FILE

LOCK_FILE = ".lock"


@contextlib.contextmanager
def open_run(folder: Path, chosen: str = "run folder") -> Iterator[Path]:
    """Create or reopen a run folder and hold it for this process.

    ``chosen``: what a user changes to have another folder, such as a flag; for error messages. Of several processes
    process 0 holds it for all, and all see it.

    Raises UserError where it cannot be written, holds something that is not a run, or another process trains in it, and
    where processes do not share it.
    """
    with contextlib.ExitStack() as stack:
        mark = found_by_first(functools.partial(_hold, folder, chosen, stack))
        seen_by_all(functools.partial(_has, folder / LOCK_FILE, mark), f"The run folder {folder}")
        yield folder


def _hold(folder: Path, chosen: str, stack: contextlib.ExitStack) -> bytes:
    """Create the folder, and lock it until ``stack`` ends; returns the content of its lock file from now on."""
    mark = secrets.token_bytes(4096)  # a whole block, so that a full disk is noticed and not only a forbidden one
    busy = f"Another process is training in {folder}; wait or choose another {chosen}."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inside = {path.name for path in folder.iterdir()}
        if inside and not inside & {LOCK_FILE, FOLDER, METRICS_FILE, CONFIG_FILE}:
            raise UserError(f"The folder {folder} holds {min(inside)} but no run; choose an empty or new {chosen}.")
        stack.enter_context(locked(folder / LOCK_FILE, busy))
        (folder / LOCK_FILE).write_bytes(mark)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"The run folder {folder} cannot be written ({reason}); choose another {chosen}.") from error
    return mark


def _has(path: Path, data: bytes) -> bool:
    """Whether the file has this content, as this process sees it."""
    try:
        return path.read_bytes() == data
    except OSError:
        return False
