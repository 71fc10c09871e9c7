"""The text files of files, folders and globs as a corpus, and a sentence on what was left out.

By default the corpus is the source code of the running interpreter's own standard library, so that training
needs no download. Read tokenizers.py next.
"""

import glob
import hashlib
import itertools
import json
import os
import re
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from hope_jax.data.text.corpus import Corpus, name_bytes
from hope_jax.data.text.formats import NotText, text_of
from hope_jax.errors import UserError

NOT_SOURCES = frozenset({"__pycache__", "site-packages", "dist-packages"})
PLAN = "plan.json"
"""The file that makes a folder one of tokens, see shards.py."""


class _File(NamedTuple):
    """A file that was asked for, ``explicit`` by its name."""

    name: str
    path: Path
    explicit: bool = False


class _Read(NamedTuple):
    """A file that was looked at; ``problem``: why it is no text, None where it is one."""

    name: str
    digest: str
    path: Path
    size: int
    problem: str | None


@dataclass(frozen=True)
class _Reader:
    """Document number -> its text; can be sent to another process."""

    texts: tuple[_Read, ...]

    def __call__(self, document: int) -> bytes:
        return _read_again(self.texts[document])


def from_files(paths: Sequence[str]) -> Corpus:
    """The text files of files, folders and globs; of the standard library when there are none.

    Folders are read with all that is in them, links to folders too; hidden files and folders are not looked at. A file
    that is reached twice counts once. Files may be JSON lines or compressed, see formats.py.

    Raises:
        UserError: a path is missing, a glob matches nothing, a file or folder cannot be read, a file given by name
            is empty, no UTF-8 text, or a pipe or device, a folder holds tokens, or nothing is left. ``read``: a file
            has changed since.
    """
    files = _unique(itertools.chain.from_iterable(map(_expand, paths)) if paths else _standard_library())
    _check_folders(files)
    found = [_examine(file) for file in files]
    texts = sorted(file for file in found if file.problem is None)
    left_out = [file for file in found if file.problem is not None]
    if not texts:
        where = " ".join(paths) or "the standard library"
        raise UserError(f"no text in {where}: {len(found)} files found, none of them non-empty UTF-8 text")
    listing = b"\n".join(text.digest.encode() + b" " + name_bytes(text.name) for text in texts)
    return Corpus(
        names=tuple(text.name for text in texts),
        read=_Reader(tuple(texts)),
        digest=hashlib.sha256(listing).hexdigest(),
        sizes=tuple(text.size for text in texts),
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


def _expand(given: str) -> Iterable[_File]:
    if not given.strip():
        raise UserError("a corpus path is the empty string: give a text file, a folder or a glob")
    path = Path(given).expanduser()
    if path.exists():
        return _walk(path, path) if path.is_dir() else [_File(path.name, path, explicit=True)]
    if not glob.has_magic(given):
        raise UserError(f"corpus path {given!r} does not exist: give a text file, a folder or a glob")
    matches = [Path(match) for match in _glob(str(path))]
    if not matches:
        raise UserError(f"the pattern {given!r} matches no file: check it, or give a file or a folder")
    root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    return itertools.chain.from_iterable(_walk(match, root) for match in matches)


def _glob(pattern: str) -> list[str]:
    """As ``glob.glob``, but below ``**`` each folder is looked at once, even where links lead in circles."""
    found = re.search(r"(?:^|(?<=/))\*\*(?:/|$)", pattern)
    if found is None:
        return glob.glob(pattern)
    starts = [Path(start) for start in glob.glob(pattern[: found.start()] or ".") if os.path.isdir(start)]
    folders = [folder for start in starts for folder, _ in _folders(start, frozenset())]
    return [match for folder in folders for match in _glob(os.path.join(glob.escape(folder), pattern[found.end() :]))]


def _walk(top: Path, root: Path) -> Iterator[_File]:
    """``top``, or the files below it if it is a folder; named relative to ``root``."""
    if not top.is_dir():
        yield _File(top.relative_to(root).as_posix(), top)
        return
    for parent, names in _folders(top, NOT_SOURCES):
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        yield from (_File(path.relative_to(root).as_posix(), path) for path in paths)


def _folders(top: Path, skip: frozenset[str]) -> Iterator[tuple[str, list[str]]]:
    """``top`` and the folders below it, each with the names in it; each once, however many links lead to it."""
    seen = {os.path.realpath(top)}
    for parent, folders, names in os.walk(top, onerror=_refuse, followlinks=True):
        visible, folders[:] = sorted(folders), []
        for name in visible:
            place = os.path.realpath(os.path.join(parent, name))
            if name not in skip and not name.startswith(".") and place not in seen:
                seen.add(place)
                folders.append(name)
        yield parent, names


def _refuse(error: OSError) -> NoReturn:
    reason = error.strerror or error
    raise UserError(f"the folder {str(error.filename)!r} cannot be read: {reason}: allow it or move it away") from error


def _unique(files: Iterable[_File]) -> list[_File]:
    """One entry for each file on the disk: one that was given by name, else the first by name."""
    chosen: dict[str, _File] = {}
    for file in sorted(files, key=lambda file: (not file.explicit, file.name)):
        chosen.setdefault(os.path.realpath(file.path), file)
    return list(chosen.values())


def _check_folders(files: Iterable[_File]) -> None:
    """UserError where a folder holds tokens: its plan and its tokenizer are files of text, but not what was meant."""
    for folder in {file.path.parent for file in files}:
        if _is_plan(folder / PLAN):
            raise UserError(
                f"{str(folder)!r} holds tokens that the command tokenize has written: give the texts themselves "
                "(pretrain reads such a folder by its name, without * and beside no texts)"
            )


def _is_plan(path: Path) -> bool:
    """Whether a file is the plan of tokens; another one may have its name."""
    try:
        plan = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError):
        return False
    return isinstance(plan, dict) and {"tokenizer", "fingerprint", "shards"} <= plan.keys()


def _examine(file: _File) -> _Read:
    data, problem = _examined(file.path)
    if problem and file.explicit:
        raise UserError(f"{str(file.path)!r} is {problem}: give a UTF-8 text file")
    return _Read(file.name, hashlib.sha256(data).hexdigest(), file.path, len(data), problem)


def _examined(path: Path) -> tuple[bytes, str | None]:
    """The text of a file, or what is there in its place, and why that is no text."""
    if special := special_file(path):
        return b"", special
    try:
        data = _bytes(path)
    except NotText as error:
        return path.read_bytes(), str(error)
    return data, _problem(data)


def _bytes(path: Path) -> bytes:
    try:
        return text_of(path)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error


def _read_again(text: _Read) -> bytes:
    try:
        data = _bytes(text.path)
    except NotText:
        data = b""
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


def _sentence(left_out: Sequence[_Read], total: int) -> str:
    """How many files and bytes were left out for each reason, without the detail in its brackets."""
    sizes: dict[str, list[int]] = {}
    for file in left_out:
        sizes.setdefault(str(file.problem).partition(" (")[0], []).append(file.size)
    parts = [f"{len(same)} {reason} ({sum(same):,} bytes)" for reason, same in sorted(sizes.items())]
    return f"Left out {len(left_out)} of {total} files: {', '.join(parts)}." if parts else ""
