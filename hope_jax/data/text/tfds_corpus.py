"""The documents of a TFDS text dataset: a Corpus like any other. Read corpus.py first."""

import hashlib
from typing import Any

import tensorflow_datasets as tfds

from hope_jax.data.text.corpus import Corpus
from hope_jax.data.tfds_source import open_tfds, records
from hope_jax.errors import UserError


def from_tfds(name: str) -> Corpus:
    """The documents of a TFDS dataset, read in place.

    Takes the training split (else the largest), and the feature called ``text`` (else the first text feature).

    Args:
        name: ``name``, ``name/config``, ``name:version``, or the folder of a prepared dataset.

    Raises:
        UserError: unknown name, not on disk and no network, prepared in a format that cannot be read at random,
            or without text.
    """
    builder = open_tfds(name)
    split = _choose_split(name, builder)
    feature = _text_feature(name, builder)
    source = records(name, builder, split)
    return Corpus(
        names=[f"{split}/{i}" for i in range(len(source))],
        read=lambda document: _to_bytes(source[document][feature]),
        digest=_digest(builder, split, feature),
        sizes=None,
    )


def _choose_split(name: str, builder: Any) -> str:
    splits = builder.info.splits
    if not splits:
        raise UserError(f"dataset {name!r} in {builder.data_dir} has no split: prepare it again")
    return "train" if "train" in splits else max(splits, key=lambda split: splits[split].num_examples)


def _text_feature(name: str, builder: Any) -> str:
    features = dict(builder.info.features)
    texts = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
    if not texts:
        raise UserError(f"dataset {name!r} has no text feature, only {', '.join(features)}: choose a text dataset")
    return "text" if "text" in texts else texts[0]


def _digest(builder: Any, split: str, feature: str) -> str:
    info = builder.info.splits[split]
    identity = (builder.info.full_name, split, feature, info.num_examples, info.num_bytes)
    return hashlib.sha256(repr(identity).encode()).hexdigest()


def _to_bytes(text: str | bytes) -> bytes:
    """TFDS hands out bytes for real data and str for some mocks; broken UTF-8 is repaired, not refused."""
    data = text.encode() if isinstance(text, str) else bytes(text)
    return data.decode("utf-8", errors="replace").encode()
