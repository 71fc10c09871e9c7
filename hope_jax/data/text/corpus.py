"""A corpus: documents in a fixed order, and which bytes of them are held out.

Documents come from files.py (read it next) or ../tfds_source.py; windows.py keeps their tokens.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

FEW = 100
"""Documents of unknown size are read to know their sizes if there are no more than these."""


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order.

    names:    relative names, the same on every machine; they decide what is held out.
    read:     document number -> its UTF-8 bytes.
    digest:   changes when a name or a byte changes.
    sizes:    bytes of each document; None when unknown before reading.
    left_out: one sentence: how many files and bytes were left out, and why; empty if none were.
    """

    names: Sequence[str]
    read: Callable[[int], bytes]
    digest: str
    sizes: Sequence[int] | None
    left_out: str = ""

    @property
    def size(self) -> int | None:
        """Bytes of all documents; None when unknown before reading."""
        return None if self.sizes is None else sum(self.sizes)


class Piece(NamedTuple):
    """Bytes start..stop of one document; stop None is its end."""

    document: int
    start: int = 0
    stop: int | None = None


class Split(NamedTuple):
    """What is trained on and what is not."""

    train: tuple[Piece, ...]
    heldout: tuple[Piece, ...]


def split(corpus: Corpus, heldout: float, seed: int) -> Split:
    """Holds out whole documents, chosen by a hash of seed and name, where their sizes allow it.

    If held-out or training text would have less than a quarter of the bytes that it should have (as with one document
    alone), bytes are counted instead: documents go to training in the order of the hash, and the document at the border
    is cut: its last bytes are held out.

    ``heldout``: the fraction held out, in (0, 1): expected of the documents, or exact of the bytes. Another ``seed``
    holds out other documents.
    """
    ranks = [_rank(name, seed) for name in corpus.names]
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    count = min(max(sum(rank < heldout for rank in ranks), 1), len(ranks) - 1)
    chosen, rest, sizes = sorted(order[:count]), sorted(order[count:]), corpus.sizes
    if sizes is None and len(order) <= FEW:
        sizes = [len(corpus.read(document)) for document in range(len(order))]
    if sizes and sum(sizes):
        share = sum(sizes[document] for document in chosen) / sum(sizes)
        if min(share / heldout, (1 - share) / (1 - heldout)) < 1 / 4:
            return _split_bytes(corpus, sizes, order[::-1], heldout)
    return Split(tuple(map(Piece, rest)), tuple(map(Piece, chosen)))


def name_bytes(name: str) -> bytes:
    """A file name as the disk has it, UTF-8 or not."""
    return name.encode("utf-8", "surrogateescape")


def _rank(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing else, so adding a file does not move the others."""
    return int.from_bytes(hashlib.sha256(f"{seed}:".encode() + name_bytes(name)).digest()[:6]) / 2**48


def _split_bytes(corpus: Corpus, sizes: Sequence[int], order: Sequence[int], heldout: float) -> Split:
    """The first bytes in ``order`` are for training."""
    left, train, rest = int(sum(sizes) * (1 - heldout)), [], []
    for document in order:
        cut = _character_start(corpus.read(document), left) if left < sizes[document] else sizes[document]
        left = max(left - cut, 0)
        if cut:
            train.append(Piece(document, 0, cut))
        if cut < sizes[document]:
            rest.append(Piece(document, cut))
    return Split(tuple(sorted(train)), tuple(sorted(rest)))


def _character_start(text: bytes, cut: int) -> int:
    while cut < len(text) and text[cut] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        cut += 1
    return cut
