"""Builds the windows of a corpus: tokenize, check what can be checked, write beside the final folder, move there.

The dataset lies in a folder named by a fingerprint of everything that shaped it, appears there only when complete,
and is opened without work the next time. Read ../batches.py next.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hope_jax.data.text.corpus import Corpus, Piece, Split
from hope_jax.data.text.tokenizers import Tokenizer, adds_blank
from hope_jax.data.text.windows import TextWindows, Windows, load
from hope_jax.data.tfds_source import prepare
from hope_jax.errors import UserError

FORMAT = 1
"""Part of the fingerprint: raise it when the same corpus should be built anew."""
GROUP_BYTES = 1 << 20
"""Text tokenized at a time."""
TOLERATED_LOSS = 0.01
"""Largest share of a corpus' bytes that its tokens may fail to account for."""
RECORD_OVERHEAD = 128
"""Bytes on disk per record beyond its tokens, generously."""
UNFINISHED = ".building-"
"""Start of the name of a folder in which a dataset is built."""


def fingerprint(corpus: Corpus, pieces: Split, tokenizer: Tokenizer, length: int) -> str:
    """Changes with the content and names of the documents, the held-out choice, the tokenizer and the length."""
    heldout = [[corpus.names[piece.document], *piece[1:]] for piece in pieces.heldout]
    parts = [FORMAT, corpus.digest, heldout, tokenizer.fingerprint, length]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def build(
    folder: Path, corpus: Corpus, pieces: Split, tokenizer: Tokenizer, length: int, progress: bool
) -> dict[str, Windows]:
    """Writes the dataset next to its folder, moves it there in one step and loads it.

    Raises:
        UserError: a split shorter than a window, text that the tokenizer loses, no room or no permission to write.
    """
    try:
        with _unfinished(folder.parent) as place:
            dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
            streams = _tokenize(place, corpus, pieces, tokenizer, dtype, progress)
            total = _checked_windows(streams, dtype, length)
            _check_room(folder.parent, total * ((length + 1) * dtype.itemsize + RECORD_OVERHEAD))
            with bar(progress, "writing windows", total, " windows") as shown:
                about = {"streams": streams, "dtype": dtype, "length": length, "written": shown.update}
                prepare(TextWindows(data_dir=place / "dataset", **about))
            _install(place / "dataset", folder)
    except OSError as error:
        raise UserError(f"cannot write the prepared corpus to {folder.parent}: {error.strerror or error}") from error
    if (splits := load(folder)) is None:
        raise UserError(f"the prepared corpus in {folder} cannot be read back: check the disk and the permissions")
    return splits


def check_place(folder: Path) -> None:
    """Refuses folders whose names the record files cannot have."""
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the folder {str(folder)!r} has a name that is not UTF-8: choose another one") from error


@contextlib.contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """An empty folder inside ``folder``, removed in the end, or by ``clear_unfinished`` if this process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, fcntl.LOCK_SH), tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder) as name:
        yield Path(name)


def clear_unfinished(folder: Path) -> None:
    """Removes what processes that are gone left of datasets; does nothing while a dataset is built in ``folder``."""
    if found := list(folder.glob(f"{UNFINISHED}*")):
        with locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
            for path in found if alone else ():
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path, how: int) -> Iterator[bool]:
    """Whether the lock of a folder was had; the system frees it when the process ends, however it ends."""
    descriptor, held = os.open(folder, os.O_RDONLY), True
    try:
        fcntl.flock(descriptor, how)
    except OSError:  # held by another process, or this file system has no locks
        held = False
    try:
        yield held
    finally:
        os.close(descriptor)


def _tokenize(
    folder: Path, corpus: Corpus, pieces: Split, tokenizer: Tokenizer, dtype: np.dtype, progress: bool
) -> dict[str, Path]:
    """Flat files of tokens, one per split."""
    if corpus.size is not None:
        _check_room(folder, corpus.size)
    count = len(pieces.train) + len(pieces.heldout)
    total, unit = (count, " documents") if corpus.size is None else (corpus.size, "B")
    streams, read, kept = {}, 0, 0
    with bar(progress, "tokenizing", total, unit) as shown:
        for split in Split._fields:
            streams[split] = folder / f"{split}.tokens"
            with streams[split].open("wb") as file:
                for texts in groups(corpus, getattr(pieces, split)):
                    ids = np.concatenate(tokenizer.encode_many(texts))
                    file.write(ids.astype(dtype).tobytes())
                    size = sum(map(len, texts))
                    read, kept = read + size, kept + int(tokenizer.byte_lengths[ids].sum())
                    shown.update(len(texts) if corpus.size is None else size)
    check_bytes(tokenizer, count, read, kept)
    return streams


def check_bytes(tokenizer: Tokenizer, texts: int, read: int, kept: int) -> None:
    """Refuses tokens that stand for another number of bytes than were ``read``, and says why they do."""
    if abs(kept - read) <= TOLERATED_LOSS * read:
        return
    blanks = texts if adds_blank(tokenizer) else 0
    if abs(kept - blanks - read) <= TOLERATED_LOSS * read:
        cause = f"it puts a blank in front of each of {texts} texts"
        remedy = "join the texts in fewer files, or use a tokenizer that adds no blank"
    else:
        cause = "it leaves out or changes some of the text (characters without a token, or a normalizer)"
        remedy = "use a byte-level tokenizer trained with the whole byte alphabet"
    raise UserError(
        f"the tokens of the chosen tokenizer stand for {kept} bytes of a text of {read}, because {cause}, so bits per "
        f"byte would be wrong: {remedy}, or bytes"
    )


def groups(corpus: Corpus, pieces: Sequence[Piece]) -> Iterator[list[bytes]]:
    """Texts of the pieces in order, enough at a time to keep all cores busy."""
    group, size = [], 0
    for piece in pieces:
        group.append(corpus.read(piece.document)[piece.start : piece.stop])
        size += len(group[-1])
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _checked_windows(streams: Mapping[str, Path], dtype: np.dtype, length: int) -> int:
    """The windows of all streams. UserError where one has none, with advice that helps."""
    tokens = {split: path.stat().st_size // dtype.itemsize for split, path in streams.items()}
    for split, other in (("train", "smaller"), ("heldout", "larger")):
        if tokens[split] <= length:
            enough = sum(tokens.values()) >= 2 * (length + 1)  # for both, if it were divided otherwise
            which, remedy = "training" if split == "train" else "held-out", f", or a {other} --data.heldout"
            raise UserError(
                f"the {which} text has {tokens[split]} tokens, one window of length {length} needs {length + 1}: give "
                f"more text, or a smaller --length{remedy if enough else ''}"
            )
    return sum((count - 1) // length for count in tokens.values())


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the prepared corpus needs about {needed / 1e6:.0f} MB in {folder} and {free / 1e6:.0f} MB are free: "
            "make room, or choose another folder"
        )


def bar(progress: bool, what: str, total: int, unit: str) -> tqdm:
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=not progress, leave=False)


def _install(built: Path, folder: Path) -> None:
    """Another process may be building the same dataset: the first to finish wins, and the others use its work."""
    if folder.exists() and load(folder) is None:
        shutil.rmtree(folder)
    try:
        built.rename(folder)
    except OSError:
        if load(folder) is None:
            raise
