"""Trains a byte-level BPE tokenizer on the documents of a corpus, by the `tokenizers` library. Read shards.py next."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hope_jax.data.text.corpus import Corpus, Piece

MARKS = 256
"""The alphabet: one token for each byte, so that every text can be written."""


def train_bpe(corpus: Corpus, pieces: Sequence[Piece], vocabulary: int, sample: int, file: Path) -> None:
    """Train a tokenizer of at most ``vocabulary`` tokens and save it in ``file``, which is whole or as it was before.

    ``sample``: bytes of text to train on, taken from the beginning of every so many-th piece.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_texts(corpus, pieces, sample), trainer)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    tokenizer.save(str(part))
    part.replace(file)


def _texts(corpus: Corpus, pieces: Sequence[Piece], sample: int) -> Iterator[str]:
    """Texts of at most ``sample`` bytes together, an equal share of each piece."""
    share = max(sample // len(pieces), 1 << 12)
    for piece in pieces[:: max(1, len(pieces) * share // sample)]:
        text = corpus.read(piece.document)[piece.start : piece.stop]
        yield text[:share].decode(errors="ignore")
