"""Text: which documents (files.py, tfds_corpus.py), what is held out (corpus.py), tokens, windows on disk.

``open_text`` in text_data.py does all of it. Read corpus.py next.
"""

from hope_jax.data.text.config import DataConfig
from hope_jax.data.text.continuation import Continuation
from hope_jax.data.text.text_data import TextData, open_text
from hope_jax.data.text.tokenizers import ByteTokenizer, JsonTokenizer, Tokenizer, make_tokenizer

__all__ = [
    "ByteTokenizer",
    "Continuation",
    "DataConfig",
    "JsonTokenizer",
    "TextData",
    "Tokenizer",
    "make_tokenizer",
    "open_text",
]
