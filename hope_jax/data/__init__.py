"""Data: text as shuffled, resumable batches of token windows (``text``), and generated tasks (``tasks``).

    config = DataConfig(path=("books",))
    tokenizer = make_tokenizer(config)
    data = open_text(config, tokenizer, length=256, cache_dir=Path("cache"))
    batches = data.train_batches(batch=8, seed=0)     # endless int32 [8, 257]; get_state() and set_state()
    data.heldout_batches(batch=8, limit=10)           # the same int32 [8, 257] each time

A sequence is a window of T + 1 tokens: the first T are read, the last T are predicted. Read text/corpus.py next.
"""

from hope_jax.errors import extra

with extra("train"):
    from hope_jax.data.batches import HeldoutBatches, TrainBatches
    from hope_jax.data.tasks.needle import Haystack, needle, needle_words, noise_haystack, text_haystack
    from hope_jax.data.tasks.recall import IGNORE, mqar
    from hope_jax.data.text.text_data import DataConfig, TextData, make_tokenizer, open_text
    from hope_jax.data.text.tokenizers import ByteTokenizer, Continuation, JsonTokenizer, Tokenizer, WordTokenizer

__all__ = [
    "IGNORE", "ByteTokenizer", "Continuation", "DataConfig", "Haystack", "HeldoutBatches", "JsonTokenizer", "TextData",
    "Tokenizer", "TrainBatches", "WordTokenizer", "make_tokenizer", "mqar", "needle", "needle_words", "noise_haystack",
    "open_text", "text_haystack",
]  # fmt: skip
