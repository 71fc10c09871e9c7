"""The documents of a corpus: text files on disk, and which of them are held out.

By default the corpus is the source code of the running interpreter's own standard library, so that training
needs no download. Documents of a TFDS dataset come from tfds_source.py; text_dataset.py reads the result.
"""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from hope_jax.errors import UserError

NOT_SOURCES = frozenset({"__pycache__", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order.

    names:   relative names, the same on every machine; they decide what is held out.
    read:    document number -> its UTF-8 bytes.
    digest:  changes when a name or a byte changes.
    size:    bytes of all documents; None when unknown before reading.
    skipped: files of folders and globs that were left out because they are empty or not UTF-8 text.
    """

    names: Sequence[str]
    read: Callable[[int], bytes]
    digest: str
    size: int | None
    skipped: int = 0


class Piece(NamedTuple):
    """Bytes start..stop of one document; stop None is its end."""

    document: int
    start: int = 0
    stop: int | None = None


class Split(NamedTuple):
    """What is trained on and what is not."""

    train: tuple[Piece, ...]
    heldout: tuple[Piece, ...]


class _File(NamedTuple):
    name: str
    path: Path
    explicit: bool


class _Text(NamedTuple):
    name: str
    digest: str
    path: Path
    size: int


def from_files(paths: Sequence[str]) -> Corpus:
    """The text files of files, folders and globs; of the standard library when there are none.

    Hidden files and folders are not looked at; a file reached twice counts once.

    Raises:
        UserError: a path is missing, a glob matches nothing, a file or folder cannot be read, a file given by name
            is empty or not UTF-8 text, or nothing is left.
    """
    files = [file for path in paths for file in _expand(path)] if paths else list(_standard_library())
    unique = list({file.path.resolve(): file for file in files}.values())
    texts = sorted(text for text in map(_examine, unique) if text is not None)
    if not texts:
        where = " ".join(paths) or "the standard library"
        raise UserError(f"no text in {where}: {len(unique)} files found, none of them non-empty UTF-8 text")
    digest = hashlib.sha256("\n".join(f"{text.digest} {text.name}" for text in texts).encode()).hexdigest()
    return Corpus(
        names=tuple(text.name for text in texts),
        read=lambda document: _read(texts[document].path),
        digest=digest,
        size=sum(text.size for text in texts),
        skipped=len(unique) - len(texts),
    )


def split(corpus: Corpus, heldout: float, seed: int) -> Split:
    """Holds out whole documents, chosen by a hash of seed and name.

    Args:
        corpus: at least one document.
        heldout: the expected fraction of documents held out, in (0, 1); at least one is, and at least one is not.
        seed: another seed holds out other documents.

    A corpus of one document is cut instead: its last bytes, this fraction of them, are held out.
    """
    if len(corpus.names) == 1:
        cut = _character_start(corpus.read(0), heldout)
        return Split((Piece(0, 0, cut),), (Piece(0, cut),))
    ranks = [_rank(name, seed) for name in corpus.names]
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    count = min(max(sum(rank < heldout for rank in ranks), 1), len(ranks) - 1)
    chosen = set(order[:count])
    pieces = [Piece(document) for document in range(len(ranks))]
    return Split(tuple(p for p in pieces if p.document not in chosen), tuple(p for p in pieces if p.document in chosen))


def _rank(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing else, so adding a file does not move the others."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6]) / 2**48


def _character_start(text: bytes, heldout: float) -> int:
    cut = int(len(text) * (1 - heldout))
    while cut < len(text) and text[cut] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        cut += 1
    return cut


def _standard_library() -> Iterator[_File]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    if not folder.is_dir():
        raise UserError(f"this interpreter has no standard library sources at {folder}: give --data.path")
    return (file for file in _walk(folder) if file.path.suffix == ".py")


def _expand(given: str) -> list[_File]:
    if not given.strip():
        raise UserError("a corpus path is the empty string: give a text file, a folder or a glob")
    path = Path(given).expanduser()
    if path.is_dir():
        return list(_walk(path))
    if path.exists():
        return [_File(path.name, path, explicit=True)]
    if not glob.has_magic(given):
        raise UserError(f"corpus path {given!r} does not exist: give a text file, a folder or a glob")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    if not matches:
        raise UserError(f"the pattern {given!r} matches no file: check it, or give a file or a folder")
    root = Path(*_before_magic(path.parts))
    folders = [file for match in matches if match.is_dir() for file in _walk(match)]
    return folders + [_File(m.relative_to(root).as_posix(), m, explicit=False) for m in matches if m.is_file()]


def _before_magic(parts: Sequence[str]) -> Sequence[str]:
    magic = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return parts[:magic]


def _walk(folder: Path) -> Iterator[_File]:
    for parent, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if name not in NOT_SOURCES and not name.startswith(".")]
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        yield from (_File(p.relative_to(folder).as_posix(), p, explicit=False) for p in paths if p.is_file())


def _refuse(error: OSError) -> NoReturn:
    reason = error.strerror or error
    raise UserError(f"the folder {str(error.filename)!r} cannot be read: {reason}: allow it or move it away") from error


def _examine(file: _File) -> _Text | None:
    data = _read(file.path)
    problem = _problem(data)
    if problem and file.explicit:
        raise UserError(f"{str(file.path)!r} {problem}: give a UTF-8 text file")
    return None if problem else _Text(file.name, hashlib.sha256(data).hexdigest(), file.path, len(data))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error


def _problem(data: bytes) -> str | None:
    if not data:
        return "is empty"
    if (position := data.find(0)) >= 0:
        return f"is binary (byte {position} is NUL)"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {error.start} is {data[error.start]:#04x})"
    return None
