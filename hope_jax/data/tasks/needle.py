"""A needle in a haystack: S-NIAH-1 (passkey) and S-NIAH-2 (number) of RULER (Hsieh et al. 2024, arXiv 2404.06654).

A long text hides a number between two of its sentences, and asks for it at the end:

    A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the
    number afterwards.
    ... One of the special magic numbers for quiet-otter is: 2748113. ...
    What is the special magic number for quiet-otter mentioned in the provided text? The special magic number for
    quiet-otter mentioned in the provided text is 2748113

S-NIAH-1 hides it in noise, the same line over and over (``noise_haystack``), S-NIAH-2 in prose (``text_haystack``).
The sentences, the line of noise, the numbers and the 40 depths are RULER's. What differs makes it a task to train on:

* A prompt has exactly the tokens that were asked for: the first sentence of the haystack is cut at its beginning.
* Prose starts anywhere in files of your choice; RULER always takes the beginning of essays that are not free.
* Keys are words of short lists; depths in noise are the same 40 values as in prose, where RULER takes any line.
* The answer has 8 tokens to be written in; RULER lets a model write 128, and finds the number anywhere in them.
* A sentence ends at a blank after a full stop, a question mark or an exclamation mark. Where the last one of a short
  prompt is longer than the room for prose, its beginning is cut off, and the needle has one place alone: after it.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, Int32

from hope_jax.data.tasks.recall import IGNORE
from hope_jax.data.text.files import from_files
from hope_jax.data.text.tokenizers import Tokenizer, WordTokenizer, adds_blank, frequent_words
from hope_jax.errors import UserError, whole

ANSWER = 8
"""Positions kept for the answer: a blank and seven digits are never more tokens."""
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
OPENING = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n"
)
NEEDLE = "One of the special magic numbers for {key} is: {value}."
QUESTION = (
    "\nWhat is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)
DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int)
"""Percent of the haystack that stand before the needle."""
_ADJECTIVES = (
    "able amber bold brave brief bright broad calm clever cold cosmic curly dizzy eager early faint fancy fierce "
    "gentle glad golden happy hollow honest humble icy jolly keen kind late lively loud lucky mellow mighty narrow "
    "noble odd pale patient plain polite proud quick quiet rapid rare rough shy silent silver smooth solid spare "
    "steady sturdy subtle swift tame tidy vivid warm wild wise"
)
_NOUNS = (
    "acorn anchor anvil apple arrow badger barrel basket beacon bell bottle bridge bucket button candle canyon castle "
    "cedar circle cloud comet compass coral crane desert drum eagle ember falcon feather fiddle forest fountain "
    "garden glacier hammer harbor island kettle ladder lantern lemon magnet maple meadow mirror otter paddle pebble "
    "pillow pocket raven ribbon river rocket saddle shadow spoon tunnel valley violin walnut whistle window"
)
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()


@dataclass(frozen=True)
class Haystack:
    """Sentences as tokens of a tokenizer, read round and round.

    Attributes:
        tokenizer: of ``ids``; it must be able to write digits, else UserError.
        blank: what stands in front of each sentence.
        ids: the tokens of all sentences, each after its blank.
        starts: where the sentences begin in ``ids``, ascending from 0.
    """

    tokenizer: Tokenizer
    blank: str
    ids: Int32[np.ndarray, " N"]
    starts: Int[np.ndarray, " sentences"]

    def __post_init__(self):
        digits = "0123456789"
        if (written := self.tokenizer.decode(self.encode(digits)).strip()) != digits:
            raise UserError(f"this tokenizer writes {digits} as {written!r}: give one that has all digits, or none")

    @functools.cached_property
    def around(self) -> int:
        """Tokens of a prompt besides its sentences, with the longest key; the room for the answer is part of it."""
        first = max(ADJECTIVES, key=lambda word: self._around(f"{word}-{NOUNS[0]}"))
        second = max(NOUNS, key=lambda word: self._around(f"{ADJECTIVES[0]}-{word}"))
        return self._around(f"{first}-{second}")

    def _around(self, key: str) -> int:
        return sum(map(len, self.parts_around(key, "1234567"))) + ANSWER - 1

    def parts_around(self, key: str, value: Any) -> list[Int32[np.ndarray, " T"]]:
        """Opening, needle and question."""
        texts = OPENING, self.blank + NEEDLE.format(key=key, value=value), QUESTION.format(key=key)
        return [self.encode(text) for text in texts]

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        """The ids of a text that follows other text."""
        return self.tokenizer.encode(_continued(self.tokenizer, text))

    def part(self, rng: np.random.Generator, room: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """``room`` tokens that end with a sentence, in two parts: what stands before the needle and what stands after.

        The needle goes to a place between two sentences that ``depth`` percent of all such places come before. The
        sentence that loses its beginning stands before it.
        """
        end = int(rng.choice(self.starts))
        rounds = len(self.ids) * np.arange((end - room) // len(self.ids), 1)
        places = (self.starts[None] + rounds[:, None]).ravel()
        places = places[(end - room <= places) & (places <= end)]
        place = int(places[(len(places) - 1) * depth // 100])
        return self._ids_at(end - room, place), self._ids_at(place, end)

    def _ids_at(self, start: int, stop: int) -> Int32[np.ndarray, " T"]:
        return self.ids[np.arange(start, stop) % len(self.ids)]


def _continued(tokenizer: Tokenizer, text: str) -> str:
    """Some tokenizers put a blank in front of every text, so the text's own one is left out."""
    return text.removeprefix(" ") if adds_blank(tokenizer) else text


def noise_haystack(tokenizer: Tokenizer) -> Haystack:
    """S-NIAH-1: a line of five sentences again and again."""
    return _haystack(tokenizer, "\n", [NOISE])


def text_haystack(tokenizer: Tokenizer, paths: Sequence[str]) -> Haystack:
    """S-NIAH-2: the sentences of text files, folders or globs, as ``DataConfig.path`` names them; kept in memory.

    Raises UserError for paths without text.
    """
    return _haystack(tokenizer, " ", _sentences(paths))


def _sentences(paths: Sequence[str]) -> list[str]:
    corpus = from_files(paths)
    documents = (" ".join(corpus.read(i).decode().split()) for i in range(len(corpus.names)))
    sentences = [sentence for text in documents for sentence in re.split(r"(?<=[.!?]) ", text) if sentence]
    if not sentences:
        raise UserError(f"no words in {' '.join(paths)}: give files with text")
    return sentences


def needle_words(most: int, paths: Sequence[str] = ()) -> WordTokenizer:
    """A tokenizer for the task: its own words come before those of the text files, of which there are none in noise.

    A prompt then needs about 100 tokens besides its haystack; in bytes it needs 370.

    Args:
        most: words, at least 0.
        paths: of ``text_haystack``; none for ``noise_haystack``.
    """
    keys = [f"{adjective}-{noun}" for adjective, noun in zip(ADJECTIVES, NOUNS, strict=True)]
    texts = NEEDLE, f" {NEEDLE}", QUESTION  # in noise the needle begins a line, in prose it follows a blank
    own = [OPENING, NOISE, *(text.format(key=key, value="") for text in texts for key in keys)]
    words = [*frequent_words(own), *frequent_words(f" {sentence}" for sentence in (_sentences(paths) if paths else ()))]
    return WordTokenizer(list(dict.fromkeys(words))[: whole("most", most, 0, "words")])


def _haystack(tokenizer: Tokenizer, blank: str, sentences: Sequence[str]) -> Haystack:
    ids = tokenizer.encode_many([_continued(tokenizer, blank + sentence).encode() for sentence in sentences])
    ends = np.cumsum([len(sentence) for sentence in ids])
    return Haystack(tokenizer, blank, np.concatenate(ids), np.concatenate([[0], ends[:-1]]))


def needle(
    seed: int, index: int, batch: int, length: int, haystack: Haystack
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
    """Inputs and targets of batch number ``index``; the same numbers give the same batch.

    The prompt is the first ``length - ANSWER + 1`` inputs of every row; from its last one on the targets are the tokens
    of the answer, " 2748113". All other targets are IGNORE. Inputs after the answer, if it is short, are 0.

    Args:
        seed, index: at least 0.
        batch: B, at least 1.
        length: T, prompt and answer together less the answer's last token, which is only a target.
        haystack: where the needle is hidden.

    Raises:
        UserError: a number below its least, or a length that the sentences around the haystack do not fit into.
    """
    for name, value, least in (("seed", seed, 0), ("index", index, 0), ("batch", batch, 1), ("length", length, 1)):
        whole(name, value, least)
    _check_room(length, haystack.around)
    rng = np.random.default_rng([seed, index])
    inputs, targets = zip(*(_example(rng, length, haystack) for _ in range(batch)), strict=True)
    return np.stack(inputs), np.stack(targets)


def _check_room(length: int, fixed: int) -> None:
    """Raise UserError where nothing is left for sentences."""
    if length <= fixed:
        raise UserError(f"length is {length}; question and answer alone need {fixed} tokens: give clearly more")


def _example(rng: np.random.Generator, length: int, haystack: Haystack) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets [T]."""
    key, value = "-".join(words[rng.integers(len(words))] for words in (ADJECTIVES, NOUNS)), rng.integers(10**6, 10**7)
    opening, hidden, question = haystack.parts_around(key, value)
    answer = haystack.encode(f" {value}")
    fixed = len(opening) + len(hidden) + len(question) + ANSWER - 1
    _check_room(length, fixed)  # a tokenizer may write one number with more tokens than another
    before, after = haystack.part(rng, length - fixed, int(rng.choice(DEPTHS)))
    tokens, targets = np.zeros(length + ANSWER, np.int32), np.full(length, IGNORE, np.int32)
    prompt = np.concatenate([opening, before, hidden, after, question])
    tokens[: len(prompt)] = prompt
    tokens[len(prompt) : len(prompt) + len(answer)] = answer
    targets[len(prompt) - 1 : len(prompt) - 1 + len(answer)] = answer
    return tokens[:length], targets
