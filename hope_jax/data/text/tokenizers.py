"""Text to token ids and back: plain bytes, or a JSON file of the `tokenizers` library.

Both report how many bytes of text each token stands for (byte_lengths.py). Read windows.py next.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import tokenizers
from jaxtyping import Int32, Int64

from hope_jax.data.text.byte_lengths import byte_lengths
from hope_jax.data.text.config import DataConfig
from hope_jax.errors import UserError

PIECE_CHARACTERS = 1 << 16
"""Long texts are encoded in pieces of about this size: in parallel, and in bounded memory."""


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the package needs to know of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0 .. vocab_size - 1."""
        ...

    @property
    def byte_lengths(self) -> Int64[np.ndarray, " vocab"]:
        """Bytes of UTF-8 text that each token stands for."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the same text could get other ids."""
        ...

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " T"]:
        """Ids of a text, without special tokens; bytes must be UTF-8."""
        ...

    def encode_many(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, " ..."]]:
        """The same as encode for each of several texts, in parallel where that helps."""
        ...

    def decode(self, ids: Iterable) -> str:
        """The text of integer ids [T]; broken UTF-8 becomes the replacement character."""
        ...


class ByteTokenizer:
    """A token is a byte: 256 ids, nothing to learn, every file fits."""

    vocab_size = 256
    fingerprint = "bytes"

    @property
    def byte_lengths(self) -> Int64[np.ndarray, " vocab"]:
        """One byte each."""
        return np.ones(self.vocab_size, np.int64)

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " T"]:
        """The UTF-8 bytes of the text."""
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def encode_many(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, " ..."]]:
        """The bytes of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable) -> str:
        """The text of integer ids [T]; broken UTF-8 becomes the replacement character. UserError outside 0..255."""
        return bytes(_checked(ids, self.vocab_size).astype(np.uint8)).decode("utf-8", errors="replace")


class JsonTokenizer:
    """A trained tokenizer read from a JSON file of the `tokenizers` library, added tokens included.

    Args:
        path: the file; UserError when it is missing, not such a file, or without tokens.
    """

    def __init__(self, path: str | Path):
        text = _read(Path(path).expanduser())
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"tokenizer {str(path)!r} is not a JSON file of the tokenizers library: {error}") from error
        # Such files often carry the settings of the model they were trained for; a corpus must not be cut or padded.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.byte_lengths = byte_lengths(self._tokenizer, self.vocab_size)
        if self.vocab_size == 0:
            raise UserError(f"tokenizer {str(path)!r} has no tokens: give one that has been trained")

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " T"]:
        """Ids without special tokens."""
        return self.encode_many([text.encode() if isinstance(text, str) else text])[0]

    def encode_many(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, " ..."]]:
        """Ids of each UTF-8 text, on all cores. Long texts are encoded in pieces that end at line ends."""
        pieces = [list(_pieces(text.decode())) for text in texts]
        flat = [piece for text in pieces for piece in text]
        encodings = iter(self._tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        ids = [[np.asarray(next(encodings).ids, np.int32) for _ in text] for text in pieces]
        return [np.concatenate(text or [np.zeros(0, np.int32)]) for text in ids]

    def decode(self, ids: Iterable) -> str:
        """The text of integer ids [T], special tokens included. UserError outside the vocabulary."""
        return self._tokenizer.decode(_checked(ids, self.vocab_size).tolist(), skip_special_tokens=False)


def make_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer a configuration names: bytes unless it gives a file. UserError when the file cannot be used."""
    return ByteTokenizer() if config.tokenizer is None else JsonTokenizer(config.tokenizer)


def _read(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"tokenizer {str(path)!r} is not a file: give a JSON file of the tokenizers library, or none")
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer {str(path)!r} cannot be read: {error}") from error


def _checked(ids: Iterable, vocab_size: int) -> np.ndarray:
    array = np.asarray(ids if hasattr(ids, "__len__") else list(ids))
    if array.size and (array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= vocab_size):
        raise UserError(
            f"token ids must be integers in 0..{vocab_size - 1}, got {array.dtype} in {array.min()}..{array.max()}"
        )
    return array


def _pieces(text: str) -> Iterator[str]:
    """Cuts after line ends that precede a non-blank: pre-tokenizers break there anyway, so no token is changed."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        ends = [m.end() for m in re.compile(r"\n(?=\S)").finditer(text, start, start + PIECE_CHARACTERS)]
        stop = ends[-1] if ends else start + PIECE_CHARACTERS
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]
