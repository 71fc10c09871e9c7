"""Data: text as shuffled, resumable batches of token windows, and synthetic tasks.

    config = DataConfig(path=("books",))
    tokenizer = make_tokenizer(config)
    data = open_text(config, tokenizer, length=256, cache_dir=Path("cache"))
    batches = data.train_batches(batch=8, seed=0)     # endless int32 [8, 257]; get_state() and set_state()
    data.heldout_batches(batch=8, limit=10)           # the same int32 [8, 257] each time

A sequence is a window of T + 1 tokens: the first T are read, the last T are predicted. Read text.py next.
"""

from hope_jax.data.config import DataConfig
from hope_jax.data.pipeline import HeldoutBatches, TrainBatches
from hope_jax.data.synthetic import IGNORE, mqar
from hope_jax.data.text import TextData, open_text
from hope_jax.data.tokenizers import ByteTokenizer, JsonTokenizer, Tokenizer, make_tokenizer

__all__ = [
    "IGNORE",
    "ByteTokenizer",
    "DataConfig",
    "HeldoutBatches",
    "JsonTokenizer",
    "TextData",
    "Tokenizer",
    "TrainBatches",
    "make_tokenizer",
    "mqar",
    "open_text",
]
