"""Paths that orbax takes as they are. Read ``checkpoint.py`` next."""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[str]:
    """A path of ``folder`` that orbax cannot take for a pattern: where its own is not plain, a link to it.

    Orbax reads brackets and backslashes in paths as patterns, and cannot write bytes that are not UTF-8.
    """
    folder = folder.absolute()
    if re.fullmatch(r"[\w/. +,=@~-]*", str(folder)):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory(prefix="hope-jax-") as place:
        link = Path(place) / "run"
        link.symlink_to(folder, target_is_directory=True)
        yield str(link)
