"""One process at a time: advisory locks on files, which end with the process that holds them."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from hope_jax.errors import UserError


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file ``path``, made if needed. Raises UserError, saying ``busy``, where another process does."""
    with path.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(busy) from error
        yield
