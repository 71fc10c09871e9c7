"""The text that new tokens add to the tokens before them.

Tokens that are decoded alone can lose a blank or half a character. The text that they add is the difference between
two decodings: of all tokens, and of the tokens before.
"""

from collections.abc import Iterable

from hope_jax.data.text.tokenizers import Tokenizer

UNFINISHED = "\ufffd"
"""The decoding of a character of which some bytes are not there yet."""


class Continuation:
    """Decodes a text piece by piece: what is printed is right wherever the tokens are cut.

    >>> continuation = Continuation(tokenizer, prompt)
    >>> "".join(continuation.add(piece) for piece in pieces)      # the text that follows the prompt

    Args:
        tokenizer: decodes the tokens.
        before: ids of the prompt, or none.
    """

    def __init__(self, tokenizer: Tokenizer, before: Iterable = ()):
        self._tokenizer, self._ids = tokenizer, [int(token) for token in before]
        self._shown = self._text()

    def add(self, ids: Iterable) -> str:
        """The text that integer ids [T] add. A character whose last bytes are missing comes with a later call."""
        self._ids.extend(int(token) for token in ids)
        text = self._text()
        if len(text) <= len(self._shown):  # an unfinished character can spoil those before it
            return ""
        added, self._shown = text[len(self._shown) :], text
        return added

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids).rstrip(UNFINISHED)
