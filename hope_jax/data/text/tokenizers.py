"""Text to token ids and back: plain bytes, words and bytes, or a JSON file of the `tokenizers` library.

All know how many bytes of text each token stands for, so that losses compare in bits per byte. Read windows.py next.
"""

import abc
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int32, Int64

from hope_jax.data.text.files import special_file
from hope_jax.errors import UserError

PIECE_CHARACTERS = 1 << 16
"""Long texts are encoded in pieces of about this size: in parallel, and in bounded memory."""
LINE_ENDS = (re.compile(r"(?<=\S)\n(?=\S)"), re.compile(r"\n(?=\S)"))
PIECES = 1
"""Part of the fingerprint: raise it when texts are cut into other pieces."""
WORDS = re.compile(rb"( ?[A-Za-z]+)")
UNFINISHED = "\ufffd"
"""The decoding of a character of which some bytes are not there yet."""


class Tokenizer(abc.ABC):
    """What the rest of the package needs to know of a tokenizer.

    vocab_size:   ids are 0 .. vocab_size - 1.
    byte_lengths: bytes of UTF-8 text that each token stands for; 0 for ids without a token.
    fingerprint:  changes when the same text could get other ids.
    """

    vocab_size: int
    byte_lengths: Int64[np.ndarray, " vocab"]
    fingerprint: str

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " T"]:
        """Ids of a text, without special tokens; bytes must be UTF-8."""
        try:
            return self.encode_many([text.encode() if isinstance(text, str) else text])[0]
        except UnicodeEncodeError as error:
            where = f"character {error.start} of the text is {text[error.start]!r}"
            raise UserError(f"{where}, a byte that is not UTF-8: give the text in UTF-8") from error

    @abc.abstractmethod
    def encode_many(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, " ..."]]:
        """The ids of each of several texts, in parallel where that helps."""

    def decode(self, ids: Iterable) -> str:
        """The text of integer ids [T], special tokens included; broken UTF-8 becomes the replacement character.

        UserError for ids outside the vocabulary, or of several sequences.
        """
        array = np.asarray(ids if hasattr(ids, "__len__") else list(ids))
        if array.ndim != 1:
            raise UserError(f"token ids have shape {array.shape}, expected [T]: decode one sequence at a time")
        if array.size and (array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= self.vocab_size):
            found = f"{array.dtype} in {array.min()}..{array.max()}"
            raise UserError(f"token ids must be integers in 0..{self.vocab_size - 1}, got {found}")
        return self._decode(array.tolist())

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


class ByteTokenizer(Tokenizer):
    """A token is a byte: 256 ids, nothing to learn, every file fits."""

    def __init__(self):
        self.vocab_size, self.byte_lengths, self.fingerprint = 256, np.ones(256, np.int64), "bytes"

    def encode_many(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, " ..."]]:
        """The bytes of each text."""
        return [np.frombuffer(text, np.uint8).astype(np.int32) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def frequent_words(texts: Iterable[str]) -> list[str]:
    """The words of two or more characters that a ``WordTokenizer`` could have, the most frequent ones first."""
    count = Counter(word for text in texts for word in WORDS.findall(text.encode()) if len(word) > 1)
    return [word.decode() for word, _ in count.most_common()]


class WordTokenizer(Tokenizer):
    """A token is one of these words, with the blank before it if it has one, or a byte of anything else, as of digits.

    ``words``: letters of ASCII, at least two characters with the blank; ids 0 .. 255 are the bytes, then come these.
    Raises UserError for words that no text is cut into.
    """

    def __init__(self, words: Iterable[str]):
        known = list(dict.fromkeys(word.encode() for word in words))
        if wrong := [word for word in known if len(word) < 2 or not WORDS.fullmatch(word)]:
            raise UserError(
                f"{wrong[0].decode()!r} is no word: give two or more letters of ASCII, or blank and letters"
            )
        self._tokens = [*(bytes([byte]) for byte in range(256)), *known]
        self._ids = {token: index for index, token in enumerate(self._tokens)}
        self.vocab_size, self.byte_lengths = len(self._tokens), np.array([len(token) for token in self._tokens])
        self.fingerprint = hashlib.sha256(b"words" + b"\n".join(known)).hexdigest()

    def encode_many(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, " ..."]]:
        """The words and bytes of each text."""
        return [
            np.array([index for piece in WORDS.split(text) for index in self._of(piece)], np.int32) for text in texts
        ]

    def _of(self, piece: bytes) -> Iterable[int]:
        return [self._ids[piece]] if piece in self._ids else piece

    def _decode(self, ids: list[int]) -> str:
        return b"".join(self._tokens[index] for index in ids).decode("utf-8", errors="replace")


class JsonTokenizer(Tokenizer):
    """A trained tokenizer read from a JSON file of the `tokenizers` library, added tokens included.

    Settings of training are switched off: a text always gets the same ids, all of them and no more. UserError when the
    file is missing, not such a file, or without tokens.
    """

    def __init__(self, path: str | Path):
        path = Path(path).expanduser()
        if not path.is_file():
            what = special_file(path) or "not a file"
            raise UserError(f"tokenizer {str(path)!r} is {what}: give a JSON file of the tokenizers library, or none")
        try:
            definition = _definition(path.read_text("utf-8"))
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except OSError as error:
            raise UserError(f"tokenizer {str(path)!r} cannot be read: {error.strerror or error}") from error
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"tokenizer {str(path)!r} is not a JSON file of the tokenizers library: {error}") from error
        self.fingerprint = hashlib.sha256(f"{PIECES} {definition}".encode()).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        if self.vocab_size == 0:
            raise UserError(f"tokenizer {str(path)!r} has no tokens: give one that has been trained")
        self.byte_lengths = _byte_lengths(self._tokenizer, self.vocab_size)
        self._line = "\n" if adds_blank(self) else ""
        self._lead = self._ids(self._line)

    def encode_many(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, " ..."]]:
        """Ids of each UTF-8 text, on all cores. Long texts are encoded in pieces that end at line ends."""
        pieces = [list(_pieces(text)) for text in texts]
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

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def read_tokenizer(file: str | Path | None) -> Tokenizer:
    """The tokenizer of a JSON file; None: bytes. Raises UserError where the file cannot be used."""
    return ByteTokenizer() if file is None else JsonTokenizer(file)


class Continuation:
    """The text that new tokens add to the tokens before them, wherever the tokens are cut.

    Tokens that are decoded alone can lose a blank or half a character; the text that they add is the difference between
    two decodings: of all tokens, and of the tokens before.

    >>> continuation = Continuation(tokenizer, prompt)
    >>> "".join(continuation.add(piece) for piece in pieces)      # the text that follows the prompt

    ``before``: ids of the prompt, or none.
    """

    def __init__(self, tokenizer: Tokenizer, before: Iterable = ()):
        self._tokenizer, self._ids, self._shown = tokenizer, [], ""
        self.add(before)

    def add(self, ids: Iterable) -> str:
        """The text that integer ids [T] add. A character whose last bytes are missing comes with a later call."""
        self._ids.extend(int(token) for token in ids)
        text = self._tokenizer.decode(self._ids).rstrip(UNFINISHED)
        if len(text) <= len(self._shown):  # an unfinished character can spoil those before it
            return ""
        added, self._shown = text[len(self._shown) :], text
        return added


def adds_blank(tokenizer: Tokenizer) -> bool:
    """Whether a text gets a blank in front, as SentencePiece does it."""
    return bool(tokenizer.byte_lengths[tokenizer.encode("a")].sum() == 2)


def _definition(text: str) -> str:
    """The contents of a file without settings of the model it was made for, which would cut, pad or vary ids."""
    definition = json.loads(text)
    if not isinstance(definition, dict) or not isinstance(definition.get("model"), dict):
        raise ValueError("it has no model")
    model = definition["model"] | ({"dropout": None} if definition["model"].get("dropout") else {})
    return json.dumps(definition | {"truncation": None, "padding": None, "model": model})


def _pieces(text: bytes) -> Iterator[str]:
    """Cuts where pre-tokenizers break anyway: after a line end between two non-blanks, else after any line end."""
    try:
        rest, start = text.decode(), 0
    except UnicodeDecodeError as error:
        where = f"byte {error.start} of the text is {text[error.start]:#04x}"
        raise UserError(f"{where}, no UTF-8: give the text in UTF-8") from error
    while len(rest) - start > PIECE_CHARACTERS:
        limit = start + PIECE_CHARACTERS
        found = (list(pattern.finditer(rest, start, limit)) for pattern in LINE_ENDS)
        stop = next((ends[-1].end() for ends in found if ends), limit)
        yield rest[start:stop]
        start = stop
    if start < len(rest):
        yield rest[start:]


def _byte_lengths(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> Int64[np.ndarray, " vocab"]:
    """Bytes of each token: exact for byte-level vocabularies (a character for each byte) and for byte-fallback ones."""
    added, definition = tokenizer.get_added_tokens_decoder(), json.loads(tokenizer.to_str())
    byte_level = '"type": "ByteLevel"' in json.dumps([definition["pre_tokenizer"], definition["decoder"]])
    lengths = np.zeros(vocab_size, np.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = len(token) if byte_level and index not in added else _plain_length(token)
    return lengths


def _plain_length(token: str) -> int:
    """Other vocabularies write text as it is, except blanks (one symbol) and single bytes (<0x0A>)."""
    is_byte = re.fullmatch(r"<0x[0-9A-F]{2}>", token)
    return 1 if is_byte else len(token.replace("\u2581", " ").encode())
