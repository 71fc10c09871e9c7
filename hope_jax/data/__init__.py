"""Data: text as shuffled, resumable batches of token windows (``text``), and generated tasks (``tasks``).

    config = DataConfig(path=("books",))
    tokenizer = make_tokenizer(config)
    data = open_text(config, tokenizer, length=256, cache_dir=Path("cache"))
    batches = data.train_batches(batch=8, seed=0)     # endless int32 [8, 257]; get_state() and set_state()
    data.heldout_batches(batch=8, limit=10)           # the same int32 [8, 257] each time

A sequence is a window of T + 1 tokens: the first T are read, the last T are predicted. Read text/corpus.py next.

What needs grain and TFDS is imported when it is first used: tokenizers and tasks, all that a trained model needs, are
there at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hope_jax.errors import extra

if TYPE_CHECKING:
    from hope_jax.data.batches import HeldoutBatches, TrainBatches
    from hope_jax.data.text.text_data import DataConfig, TextData, make_tokenizer, open_text

with extra("train"):
    from hope_jax.data.tasks.needle import Haystack, needle, needle_words, noise_haystack, text_haystack
    from hope_jax.data.tasks.recall import IGNORE, mqar
    from hope_jax.data.text.tokenizers import (
        ByteTokenizer,
        Continuation,
        JsonTokenizer,
        Tokenizer,
        WordTokenizer,
        read_tokenizer,
    )

__all__ = [
    "IGNORE", "ByteTokenizer", "Continuation", "DataConfig", "Haystack", "HeldoutBatches", "JsonTokenizer", "TextData",
    "Tokenizer", "TrainBatches", "WordTokenizer", "make_tokenizer", "mqar", "needle", "needle_words", "noise_haystack",
    "open_text", "read_tokenizer", "text_haystack",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hope_jax.data' has no attribute {name!r}")
    home = "batches" if name in ("HeldoutBatches", "TrainBatches") else "text.text_data"
    with extra("train"):
        return getattr(importlib.import_module(f"hope_jax.data.{home}"), name)
