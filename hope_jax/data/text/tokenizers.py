"""Text to token ids and back: plain bytes, or a JSON file of the `tokenizers` library.

Both report how many bytes of text each token stands for (byte_lengths.py). Read windows.py next.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tokenizers
from jaxtyping import Int32, Int64

from hope_jax.data.text.byte_lengths import byte_lengths
from hope_jax.data.text.config import DataConfig
from hope_jax.data.text.files import special_file
from hope_jax.errors import UserError

PIECE_CHARACTERS = 1 << 16
"""Long texts are encoded in pieces of about this size: in parallel, and in bounded memory."""
LINE_ENDS = (re.compile(r"(?<=\S)\n(?=\S)"), re.compile(r"\n(?=\S)"))
PIECES = 1
"""Part of the fingerprint: raise it when texts are cut into other pieces."""


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
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def encode_many(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, " ..."]]:
        """The bytes of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable) -> str:
        """The text of integer ids [T]; broken UTF-8 becomes the replacement character. UserError outside 0..255."""
        return bytes(_checked(ids, self.vocab_size).astype(np.uint8)).decode("utf-8", errors="replace")


class JsonTokenizer:
    """A trained tokenizer read from a JSON file of the `tokenizers` library, added tokens included.

    Settings of training are switched off: a text always gets the same ids, all of them and no more.

    Args:
        path: the file; UserError when it is missing, not such a file, or without tokens.
    """

    def __init__(self, path: str | Path):
        definition = _definition(Path(path).expanduser())
        text = json.dumps(definition)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"tokenizer {str(path)!r} is not a JSON file of the tokenizers library: {error}") from error
        self.fingerprint = hashlib.sha256(f"{PIECES} {text}".encode()).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.byte_lengths = byte_lengths(self._tokenizer, self.vocab_size)
        if self.vocab_size == 0:
            raise UserError(f"tokenizer {str(path)!r} has no tokens: give one that has been trained")
        self._line = "\n" if adds_blank(self) else ""
        self._lead = self._ids(self._line)

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " T"]:
        """Ids without special tokens."""
        return self.encode_many([_utf8(text)])[0]

    def encode_many(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, " ..."]]:
        """Ids of each UTF-8 text, on all cores. Long texts are encoded in pieces that end at line ends."""
        pieces = [list(_pieces(_unicode(text))) for text in texts]
        flat = [self._line + piece if at else piece for text in pieces for at, piece in enumerate(text)]
        encodings = iter(self._tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        ids = [[self._own(at, piece, next(encodings).ids) for at, piece in enumerate(text)] for text in pieces]
        return [np.concatenate(text or [np.zeros(0, np.int32)]) for text in ids]

    def _own(self, at: int, piece: str, ids: list[int]) -> Int32[np.ndarray, " T"]:
        """The ids of piece number ``at``. Later ones follow a line end, so that no blank is put in front of them."""
        if at and ids[: len(self._lead)] != self._lead:
            return np.asarray(self._ids(piece), np.int32)
        return np.asarray(ids[len(self._lead) if at else 0 :], np.int32)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable) -> str:
        """The text of integer ids [T], special tokens included. UserError outside the vocabulary."""
        return self._tokenizer.decode(_checked(ids, self.vocab_size).tolist(), skip_special_tokens=False)


def adds_blank(tokenizer: Tokenizer) -> bool:
    """Whether a text gets a blank in front, as SentencePiece does it."""
    return bool(tokenizer.byte_lengths[tokenizer.encode("a")].sum() == 2)


def make_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer a configuration names: bytes unless it gives a file. UserError when the file cannot be used."""
    return ByteTokenizer() if config.tokenizer is None else JsonTokenizer(config.tokenizer)


def _definition(path: Path) -> dict[str, Any]:
    """The contents of the file, less the settings of the model that it was trained for: they cut, pad or vary ids."""
    if not path.is_file():
        what = special_file(path) or "not a file"
        raise UserError(f"tokenizer {str(path)!r} is {what}: give a JSON file of the tokenizers library, or none")
    try:
        definition = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"tokenizer {str(path)!r} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"tokenizer {str(path)!r} is not a JSON file of the tokenizers library: {error}") from error
    if not isinstance(definition, dict) or not isinstance(definition.get("model"), dict):
        raise UserError(f"tokenizer {str(path)!r} is not a JSON file of the tokenizers library: it has no model")
    model = definition["model"] | ({"dropout": None} if definition["model"].get("dropout") else {})
    return definition | {"truncation": None, "padding": None, "model": model}


def _utf8(text: str | bytes) -> bytes:
    try:
        return text.encode() if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise UserError(f"character {error.start} of the text is {text[error.start]!r}, a byte that is not UTF-8: give "
                        "the text in UTF-8") from error  # fmt: skip


def _unicode(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start} of the text is {text[error.start]:#04x}, no UTF-8: give the text "
                        "in UTF-8") from error  # fmt: skip


def _checked(ids: Iterable, vocab_size: int) -> np.ndarray:
    array = np.asarray(ids if hasattr(ids, "__len__") else list(ids))
    if array.ndim != 1:
        raise UserError(f"token ids have shape {array.shape}, expected [T]: decode one sequence at a time")
    if array.size and (array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= vocab_size):
        raise UserError(
            f"token ids must be integers in 0..{vocab_size - 1}, got {array.dtype} in {array.min()}..{array.max()}"
        )
    return array


def _pieces(text: str) -> Iterator[str]:
    """Cuts where pre-tokenizers break anyway: after a line end between two non-blanks, else after any line end."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        limit = start + PIECE_CHARACTERS
        found = (list(pattern.finditer(text, start, limit)) for pattern in LINE_ENDS)
        stop = next((ends[-1].end() for ends in found if ends), limit)
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]
