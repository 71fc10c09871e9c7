"""How many bytes of text each token stands for, so that losses of different tokenizers compare in bits per byte."""

import json
import re

import numpy as np
import tokenizers
from jaxtyping import Int64


def byte_lengths(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> Int64[np.ndarray, " vocab"]:
    """Exact for byte-level and byte-fallback vocabularies; ids without a token have 0."""
    added = tokenizer.get_added_tokens_decoder()
    byte_level = _is_byte_level(json.loads(tokenizer.to_str()))
    lengths = np.zeros(vocab_size, np.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = len(token) if byte_level and index not in added else _plain_length(token)
    return lengths


def _is_byte_level(definition: dict) -> bool:
    """Byte-level vocabularies write each byte as one printable character."""
    steps = [definition.get("pre_tokenizer"), definition.get("decoder")]
    while steps:
        step = steps.pop() or {}
        if step.get("type") == "ByteLevel":
            return True
        steps += step.get("pretokenizers", []) + step.get("decoders", [])
    return False


def _plain_length(token: str) -> int:
    """Other vocabularies write text as it is, but for the blank (one symbol) and for single bytes (<0x0A>)."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return 1
    return len(token.replace("\u2581", " ").encode())
