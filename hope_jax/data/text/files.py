"""The text files of files, folders and globs as a corpus, and a sentence on what was left out.

By default the corpus is the source code of the running interpreter's own standard library, so that training
needs no download. Read tokenizers.py next.
"""

import glob
import hashlib
import os
import re
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from hope_jax.data.text.corpus import Corpus, name_bytes
from hope_jax.errors import UserError

NOT_SOURCES = frozenset({"__pycache__", "site-packages", "dist-packages"})


class _File(NamedTuple):
    name: str
    path: Path
    explicit: bool


class _Text(NamedTuple):
    name: str
    digest: str
    path: Path
    size: int


class _LeftOut(NamedTuple):
    reason: str
    size: int


def from_files(paths: Sequence[str]) -> Corpus:
    """The text files of files, folders and globs; of the standard library when there are none.

    Folders are read with all that is in them, links to folders too; hidden files and folders are not looked at. A file
    that is reached twice counts once.

    Raises:
        UserError: a path is missing, a glob matches nothing, a file or folder cannot be read, a file given by name
            is empty, no UTF-8 text, or a pipe or device, or nothing is left. ``read``: a file has changed since.
    """
    files = [file for path in paths for file in _expand(path)] if paths else list(_standard_library())
    found = [_examine(file) for file in _unique(files)]
    texts = sorted(file for file in found if isinstance(file, _Text))
    left_out = [file for file in found if isinstance(file, _LeftOut)]
    if not texts:
        where = " ".join(paths) or "the standard library"
        raise UserError(f"no text in {where}: {len(found)} files found, none of them non-empty UTF-8 text")
    listing = b"\n".join(text.digest.encode() + b" " + name_bytes(text.name) for text in texts)
    return Corpus(
        names=tuple(text.name for text in texts),
        read=lambda document: _read_again(texts[document]),
        digest=hashlib.sha256(listing).hexdigest(),
        sizes=tuple(text.size for text in texts),
        skipped=len(left_out),
        left_out=_sentence(left_out, len(found)),
    )


def special_file(path: Path) -> str | None:
    """What a path is that is neither a file nor a folder: such a thing may block, never end, or be read only once."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return "a broken link" if path.is_symlink() else None
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    return "a pipe (it can be read only once)" if stat.S_ISFIFO(mode) else "a device or socket"


def _standard_library() -> Iterator[_File]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    if not folder.is_dir():
        raise UserError(f"this interpreter has no standard library sources at {folder}: give --data.path")
    return (file for file in _walk(folder, folder) if file.path.suffix == ".py")


def _expand(given: str) -> list[_File]:
    if not given.strip():
        raise UserError("a corpus path is the empty string: give a text file, a folder or a glob")
    path = Path(given).expanduser()
    if path.is_dir():
        return list(_walk(path, path))
    if path.exists():
        return [_File(path.name, path, explicit=True)]
    if not glob.has_magic(given):
        raise UserError(f"corpus path {given!r} does not exist: give a text file, a folder or a glob")
    matches = [Path(match) for match in _glob(str(path))]
    if not matches:
        raise UserError(f"the pattern {given!r} matches no file: check it, or give a file or a folder")
    root = Path(*_before_magic(path.parts))
    return [file for match in matches for file in _matched(match, root)]


def _before_magic(parts: Sequence[str]) -> Sequence[str]:
    magic = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return parts[:magic]


def _matched(match: Path, root: Path) -> Iterable[_File]:
    return _walk(match, root) if match.is_dir() else [_File(match.relative_to(root).as_posix(), match, explicit=False)]


def _glob(pattern: str) -> list[str]:
    """As ``glob.glob``, but below ``**`` each folder is looked at once, even where links lead in circles."""
    found = re.search(r"(?:^|(?<=/))\*\*(?:/|$)", pattern)
    if found is None:
        return glob.glob(pattern)
    starts = [Path(start) for start in glob.glob(pattern[: found.start()] or ".") if os.path.isdir(start)]
    folders = [folder for start in starts for folder, _ in _folders(start, frozenset())]
    return [match for folder in folders for match in _glob(os.path.join(glob.escape(folder), pattern[found.end() :]))]


def _walk(folder: Path, root: Path) -> Iterator[_File]:
    """The files below ``folder``, named relative to ``root``."""
    for parent, names in _folders(folder, NOT_SOURCES):
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        yield from (_File(path.relative_to(root).as_posix(), path, explicit=False) for path in paths)


def _folders(folder: Path, skip: frozenset[str]) -> Iterator[tuple[str, list[str]]]:
    """``folder`` and those below it, each with the names in it; each once, however many links lead to it."""
    seen = {_identity(folder)}
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        visible = [name for name in sorted(folders) if name not in skip and not name.startswith(".")]
        folders[:] = [name for name in visible if _is_new(Path(parent, name), seen)]
        yield parent, names


def _is_new(folder: Path, seen: set[tuple[int, int]]) -> bool:
    """Whether ``folder`` was not seen before; now it is."""
    identity = _identity(folder)
    is_new = identity not in seen
    seen.add(identity)
    return is_new


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _refuse(error: OSError) -> NoReturn:
    reason = error.strerror or error
    raise UserError(f"the folder {str(error.filename)!r} cannot be read: {reason}: allow it or move it away") from error


def _unique(files: Iterable[_File]) -> list[_File]:
    """One entry for each file on the disk: one that was given by name, else the first by name."""
    chosen: dict[str, _File] = {}
    for file in sorted(files, key=lambda file: (not file.explicit, file.name)):
        chosen.setdefault(os.path.realpath(file.path), file)
    return list(chosen.values())


def _examine(file: _File) -> _Text | _LeftOut:
    special = special_file(file.path)
    data = b"" if special else _read(file.path)
    reason = special or _problem(data)
    if reason is None:
        return _Text(file.name, hashlib.sha256(data).hexdigest(), file.path, len(data))
    if file.explicit:
        raise UserError(f"{str(file.path)!r} is {reason}: give a UTF-8 text file")
    return _LeftOut(reason.partition(" (")[0], len(data))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error


def _read_again(text: _Text) -> bytes:
    data = _read(text.path)
    if hashlib.sha256(data).hexdigest() != text.digest:
        raise UserError(f"{str(text.path)!r} has changed since it was first read: run the command again")
    return data


def _problem(data: bytes) -> str | None:
    if not data:
        return "empty"
    if (position := data.find(0)) >= 0:
        return f"binary (byte {position} is NUL)"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start} is {data[error.start]:#04x})"
    return None


def _sentence(left_out: Sequence[_LeftOut], total: int) -> str:
    if not left_out:
        return ""
    parts = []
    for reason in sorted({file.reason for file in left_out}):
        sizes = [file.size for file in left_out if file.reason == reason]
        parts.append(f"{len(sizes)} {reason} ({sum(sizes):,} bytes)")
    return f"Left out {len(left_out)} of {total} files: {', '.join(parts)}."
