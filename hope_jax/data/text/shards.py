"""Tokens that are written once, by many processes, as records of fixed length in files (shards) of their own.

A folder of them holds ``plan.json``: what is tokenized, how, and which documents go into which shard; the shards, which
appear only when they are whole; and ``tokens.json``, once all of them are there. A shard depends on its documents
alone. Its documents follow one another without a separator; record k has the tokens kT .. kT + T, and the last tokens,
fewer than T, are left out. Read tokenizing.py next: it writes a folder.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Integer

from hope_jax.data.text.corpus import Corpus, Piece, Split
from hope_jax.data.text.files import PLAN
from hope_jax.data.text.tokenizers import Tokenizer
from hope_jax.data.text.windows import Mixture, Windows
from hope_jax.errors import UserError

FORMAT = 1
"""Part of the fingerprint: raise it when the same text should be tokenized anew."""
SHARD_BYTES = 1 << 26
"""Text of one shard, where whole documents allow it."""
SHARD_DOCUMENTS = 10_000
"""Documents of one shard where their sizes are not known."""
TOKENS, TOKENIZER = "tokens.json", "tokenizer.json"
OPTIONS = "group_size:1,uncompressed"
"""Each record can be read alone; tokens hardly compress."""


@dataclass(frozen=True)
class Shard:
    """A file of records and the pieces of documents that go into it."""

    name: str
    pieces: tuple[Piece, ...]


def shards(corpus: Corpus, pieces: Split) -> list[Shard]:
    """The shards of a corpus, those of the training split first."""
    return [
        Shard(f"{split}-{number:05}.array_record", group)
        for split in Split._fields
        for number, group in enumerate(_groups(corpus, getattr(pieces, split)))
    ]


def _groups(corpus: Corpus, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, ...]]:
    group, filled = [], 0.0
    for piece in pieces:
        size = 1 / SHARD_DOCUMENTS if corpus.sizes is None else size_of(corpus, piece) / SHARD_BYTES
        if group and filled + size > 1:
            yield tuple(group)
            group, filled = [], 0.0
        group.append(piece)
        filled += size
    if group:
        yield tuple(group)


def size_of(corpus: Corpus, piece: Piece) -> int:
    """Bytes of a piece; 1 where sizes are not known."""
    if corpus.sizes is None:
        return 1
    return (corpus.sizes[piece.document] if piece.stop is None else piece.stop) - piece.start


def plan_of(corpus: Corpus, pieces: Split, tokenizer: Tokenizer, length: int) -> dict[str, Any]:
    """All that decides what the shards hold, as JSON; ``fingerprint`` is of everything in it and of the text."""
    names = [
        [shard.name, [[corpus.names[p.document], *p[1:]] for p in shard.pieces]] for shard in shards(corpus, pieces)
    ]
    plan = {"format": FORMAT, "tokenizer": tokenizer.fingerprint, "length": length, "text": corpus.digest}
    parts = json.dumps([plan, names]).encode()
    return plan | {
        "dtype": np.min_scalar_type(tokenizer.vocab_size - 1).name,
        "shards": len(names),
        "fingerprint": hashlib.sha256(parts).hexdigest()[:32],
    }


def write_shard(path: Path, tokens: Iterable[Integer[np.ndarray, " T"]], dtype: np.dtype, length: int) -> None:
    """The records of consecutive tokens. The file has its name only when all of it is on disk."""
    part, rest = path.with_name(f"{path.name}.part"), np.zeros(0, dtype)
    part.unlink(missing_ok=True)
    writer = ArrayRecordWriter(str(part), OPTIONS)
    for piece in tokens:
        rest = np.concatenate([rest, piece.astype(dtype)])
        whole = max(len(rest) - 1, 0) // length
        for start in range(0, whole * length, length):
            writer.write(rest[start : start + length + 1].tobytes())
        rest = rest[whole * length :]
    writer.close()
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.rename(path)


def records_in(path: Path) -> int:
    """The number of records of a shard."""
    reader = ArrayRecordReader(str(path))
    count = reader.num_records()
    reader.close()
    return count


def write_json(path: Path, value: Any) -> None:
    """A small file that is whole or not there."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=1))
    part.replace(path)


class _Whole(NamedTuple):
    """All records of a file; array_record opens it when it is read from."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class _Records:
    """The records of several files, one after another, as ``Windows`` reads them."""

    def __init__(self, source: ArrayRecordDataSource, dtype: np.dtype):
        self._source, self._dtype = source, dtype

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"tokens": np.frombuffer(self._source[index], self._dtype)}


def is_tokens(paths: Sequence[str]) -> bool:
    """Whether one of the paths is a folder that was tokenized, or half so."""
    return any((Path(path).expanduser() / PLAN).is_file() for path in paths)


def open_mixture(
    paths: Sequence[str], weights: Sequence[float], tokenizer: Tokenizer, length: int
) -> tuple[dict[str, Any], str]:
    """``open_tokens`` of several folders; ``weights``: how often each is trained on, (): by their records."""
    found = [open_tokens(Path(path).expanduser(), tokenizer, length) for path in paths]
    if len(found) == 1:
        return found[0]
    train, heldout = ([splits[name] for splits, _ in found] for name in Split._fields)
    weights = weights or [float(len(part)) for part in train]
    parts = json.dumps([[fingerprint for _, fingerprint in found], list(weights)])
    both = {"train": Mixture(train, weights), "heldout": Mixture(heldout, [1.0] * len(heldout))}
    return both, hashlib.sha256(parts.encode()).hexdigest()[:32]


def open_tokens(folder: Path, tokenizer: Tokenizer, length: int) -> tuple[dict[str, Windows], str]:
    """The windows of each split of a folder, and its fingerprint.

    Raises UserError where it is not finished, damaged, or of another tokenizer or length.
    """
    again = "run the command tokenize again with the same flags"
    if not (folder / PLAN).is_file():
        raise UserError(f"{folder} is no folder that the command tokenize has written: tokenize it, too")
    if not (folder / TOKENS).is_file():
        raise UserError(f"the tokens in {folder} are not finished: {again}")
    try:
        index = json.loads((folder / TOKENS).read_text())
        plan, files = index["plan"], index["files"]
        _check(folder, plan, tokenizer, length)
        dtype = np.dtype(plan["dtype"])
        splits = {split: _windows(folder, split, files, dtype) for split in Split._fields}
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{folder / TOKENS} is damaged: delete it and {again}") from error
    return splits, plan["fingerprint"]


def _check(folder: Path, plan: Mapping[str, Any], tokenizer: Tokenizer, length: int) -> None:
    if plan["tokenizer"] != tokenizer.fingerprint:
        file = folder / TOKENIZER
        remedy = f"give --data.tokenizer {file}" if file.exists() else "leave out --data.tokenizer, they are bytes"
        raise UserError(f"the tokens in {folder} were made by another tokenizer: {remedy}")
    if plan["length"] != length:
        raise UserError(
            f"the tokens in {folder} are in windows of {plan['length']}, this run has --length {length}: give --length "
            f"{plan['length']}, or tokenize into another folder"
        )


def _windows(folder: Path, split: str, files: Mapping[str, Sequence[int]], dtype: np.dtype) -> Windows:
    """``files``: name -> records and bytes."""
    mine = {folder / name: sizes for name, sizes in sorted(files.items()) if name.startswith(f"{split}-")}
    for path, (_, size) in mine.items():
        if not path.exists() or path.stat().st_size != size:
            what = "is not as long as it was written" if path.exists() else "is missing"
            raise UserError(
                f"{path} {what}: delete {folder / TOKENS} and that file, and run the command tokenize again"
            )
    reading: Any = [_Whole(str(path), 0, count, count) for path, (count, _) in mine.items() if count]
    remedy = f"delete {TOKENS} and the file, and run the command tokenize again"
    return Windows(_Records(ArrayRecordDataSource(reading), dtype), folder, remedy)
