"""A corpus as fixed windows of tokens in a TFDS dataset (array_record files, no TensorFlow).

Documents follow one another without a separator; window k of a split holds tokens kT .. kT + T, so each token
is predicted exactly once and the last tokens, fewer than T, are left out. Train and held-out windows never
share a document. The dataset lies in a folder named by a fingerprint of everything that shaped it, appears
there only when it is complete, and is opened without work the next time. Read ../batches.py next.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError
from jaxtyping import Int32
from tqdm import tqdm

from hope_jax.data.text.corpus import Corpus, Piece, Split
from hope_jax.data.text.tokenizers import Tokenizer
from hope_jax.errors import UserError

FORMAT = 1
"""Part of the fingerprint: raise it when the same corpus should be built anew."""
SHARD_WINDOWS = 4096
"""Reading one record costs time in proportion to the records of its file: small files keep random reads fast."""
MAX_SHARDS = 256
"""Each file that has been read from stays open."""
GROUP_BYTES = 1 << 20
"""Text tokenized at a time."""
TOLERATED_LOSS = 0.01
"""Largest share of a corpus' bytes that its tokens may fail to account for."""
RECORD_OVERHEAD = 128
"""Bytes on disk per record beyond its tokens, generously."""


class TextWindows(tfds.core.ShardBasedBuilder):
    """TFDS builder of windows cut from flat files of tokens.

    Records are written in order and straight to their shard, so the size of a corpus is bounded by the disk: the
    usual generator-based builder keeps up to 1 GB in memory to shuffle it and needs TensorFlow beyond that.

    Args:
        streams: split name -> file of consecutive tokens of type dtype, one window of them at least.
        length: T; a record is {"tokens": dtype[T + 1]}.
        written: called with 1 after each window.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Windows of T + 1 tokens, T apart."}
    url_infos = None  # nothing is downloaded

    def __init__(
        self, *, streams: Mapping[str, Path], dtype: np.dtype, length: int, written: Callable[[int], Any], **kwargs: Any
    ):
        self._streams, self._dtype, self._length, self._written = streams, dtype, length, written
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = tfds.features.Tensor(shape=(self._length + 1,), dtype=self._dtype, encoding="bytes")
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Windows of {self._length} + 1 tokens of text.",
            features=tfds.features.FeaturesDict({"tokens": tokens}),
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> Mapping[str, Sequence[Callable[[], Iterator]]]:
        return {split: self._shards(path) for split, path in self._streams.items()}

    def _shards(self, path: Path) -> list[Callable[[], Iterator]]:
        windows = _windows(path.stat().st_size // self._dtype.itemsize, self._length)
        size = max(SHARD_WINDOWS, math.ceil(windows / MAX_SHARDS))
        starts = range(0, windows, size)
        return [functools.partial(self._examples, path, start, min(start + size, windows)) for start in starts]

    def _examples(self, path: Path, start: int, stop: int) -> Iterator[tuple[int, dict]]:
        tokens = np.asarray(np.memmap(path, self._dtype, mode="r"))
        for window in range(start, stop):
            first = window * self._length
            yield window, {"tokens": tokens[first : first + self._length + 1]}
            self._written(1)


@dataclass(frozen=True)
class Windows(Sequence):
    """The windows of one split, read at random: windows[i] is int32 [T + 1]."""

    records: Any
    folder: Path

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Int32[np.ndarray, " window"]:
        """UserError when the record's file is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        try:
            return self.records[index]["tokens"].astype(np.int32)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"the prepared corpus in {self.folder} is damaged (window {index}: {error}): delete that folder, it "
                "will be built again"
            ) from error


def fingerprint(corpus: Corpus, pieces: Split, tokenizer: Tokenizer, length: int) -> str:
    """Changes with the content and names of the documents, the held-out choice, the tokenizer and the length."""
    heldout = [[corpus.names[piece.document], *piece[1:]] for piece in pieces.heldout]
    parts = [FORMAT, corpus.digest, heldout, tokenizer.fingerprint, length]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def load(folder: Path) -> dict[str, Windows] | None:
    """The windows of each split in a folder written by build; None when there are none or files are missing or cut."""
    try:
        builder: Any = tfds.builder_from_directory(_dataset_folder(folder))
        splits = builder.info.splits
        sizes = {name: sum(Path(path).stat().st_size for path in splits[name].filepaths) for name in splits}
    except (OSError, ValueError, KeyError, ParseError):
        return None
    if set(splits) != set(Split._fields) or any(sizes[name] != splits[name].num_bytes for name in splits):
        return None
    return {name: Windows(builder.as_data_source(split=name), folder) for name in splits}


def build(folder: Path, corpus: Corpus, pieces: Split, tokenizer: Tokenizer, length: int, progress: bool) -> None:
    """Writes the dataset next to its folder and moves it there in one step; whatever was there is replaced.

    Raises:
        UserError: a split shorter than a window, text that the tokenizer loses, no room or no permission to write.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as name:
            dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
            streams = _tokenize(Path(name), corpus, pieces, tokenizer, dtype, progress)
            windows = {split: _checked_windows(split, path, dtype, length) for split, path in streams.items()}
            total = sum(windows.values())
            _check_room(folder.parent, total * ((length + 1) * dtype.itemsize + RECORD_OVERHEAD))
            with _bar(progress, "writing windows", total, " windows") as bar:
                _write(Path(name, "dataset"), streams, dtype, length, bar.update)
            _install(Path(name, "dataset"), folder)
    except OSError as error:
        raise UserError(f"cannot write the prepared corpus to {folder.parent}: {error.strerror or error}") from error


def _tokenize(
    folder: Path, corpus: Corpus, pieces: Split, tokenizer: Tokenizer, dtype: np.dtype, progress: bool
) -> dict[str, Path]:
    """Flat files of tokens, one per split."""
    if corpus.size is not None:
        _check_room(folder, corpus.size)
    count = len(pieces.train) + len(pieces.heldout)
    total, unit = (count, " documents") if corpus.size is None else (corpus.size, "B")
    streams, read, kept = {}, 0, 0
    with _bar(progress, "tokenizing", total, unit) as bar:
        for split in Split._fields:
            streams[split] = folder / f"{split}.tokens"
            with streams[split].open("wb") as file:
                for texts in _groups(corpus, getattr(pieces, split)):
                    ids = np.concatenate(tokenizer.encode_many(texts))
                    file.write(ids.astype(dtype).tobytes())
                    size = sum(map(len, texts))
                    read, kept = read + size, kept + int(tokenizer.byte_lengths[ids].sum())
                    bar.update(len(texts) if corpus.size is None else size)
    if abs(kept - read) > TOLERATED_LOSS * read:
        raise UserError(
            f"the tokens of the chosen tokenizer stand for {kept} bytes of a text of {read}, so bits per byte would be "
            "wrong: use a byte-level tokenizer trained with the whole byte alphabet, or bytes"
        )
    return streams


def _groups(corpus: Corpus, pieces: Sequence[Piece]) -> Iterator[list[bytes]]:
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


def _windows(tokens: int, length: int) -> int:
    return max(tokens - 1, 0) // length


def _checked_windows(split: str, path: Path, dtype: np.dtype, length: int) -> int:
    tokens = path.stat().st_size // dtype.itemsize
    if tokens <= length:
        which, remedy = ("training", "") if split == "train" else ("held-out", ", or a larger --data.heldout")
        raise UserError(
            f"the {which} text has {tokens} tokens, one window of length {length} needs {length + 1}: give more text, "
            f"or a smaller --length{remedy}"
        )
    return _windows(tokens, length)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the prepared corpus needs about {needed / 1e6:.0f} MB in {folder} and {free / 1e6:.0f} MB are free: "
            "make room, or choose another folder"
        )


def _bar(progress: bool, what: str, total: int, unit: str) -> tqdm:
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=not progress, leave=False)


def _write(
    folder: Path, streams: Mapping[str, Path], dtype: np.dtype, length: int, written: Callable[[int], Any]
) -> None:
    builder = TextWindows(streams=streams, dtype=dtype, length=length, written=written, data_dir=folder)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces downloads, of which there are none
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))


def _install(built: Path, folder: Path) -> None:
    """Another process may be building the same dataset: the first to finish wins, and the others use its work."""
    if folder.exists() and load(folder) is None:
        shutil.rmtree(folder)
    try:
        built.rename(folder)
    except OSError:
        if load(folder) is None:
            raise


def _dataset_folder(folder: Path) -> Path:
    return folder / TextWindows.name / str(TextWindows.VERSION)
