"""Made-up facts as text, one per line of 16 bytes: ``bako likes rust;``. Nobody can know them who has not read them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from hope_jax.errors import UserError

WORDS = ("rust", "blue", "corn", "dust", "echo", "fern", "gold", "hail", "iris", "jade", "kelp", "lime", "moss", "nuts")
WORDS += ("opal", "pine")
"""What is liked; no two begin alike, so the first byte says it all."""
LINE = 16
"""Bytes of a fact."""
ASKED = len("bako likes ")
"""Bytes of a fact before the first that only its reader can know."""
CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aeiou"
HELDOUT = 8
"""Every so many-th name is never used in training."""


class Facts(NamedTuple):
    """Sets of facts, and the same ones asked in another order; bytes."""

    told: Int32[np.ndarray, "B facts line"]
    asked: Int32[np.ndarray, "B facts line"]


def names(heldout: bool) -> list[str]:
    """All names of that part."""
    syllables = [a + b for a in CONSONANTS for b in VOWELS]
    every = [first + second for first in syllables for second in syllables]
    return [name for i, name in enumerate(every) if (i % HELDOUT == 0) == heldout]


def draw_facts(seed: int, index: int, batch: int, count: int, heldout: bool) -> Facts:
    """Batch number ``index``: for each of ``batch`` readers ``count`` facts about different names.

    The same numbers give the same batch. Raises UserError for fewer than one fact or more than there are names.
    """
    known = names(heldout)
    if not 1 <= count <= len(known):
        raise UserError(f"{count} facts are asked for; expected 1 to {len(known)}, one for each name")
    rng = np.random.default_rng([seed, index, heldout])
    told = np.array([_lines(rng, known, count) for _ in range(batch)], np.int32).reshape(batch, count, LINE)
    order = rng.permuted(np.tile(np.arange(count), (batch, 1)), axis=1)
    return Facts(told, np.take_along_axis(told, order[:, :, None], axis=1))


def _lines(rng: np.random.Generator, known: list[str], count: int) -> Int32[np.ndarray, "facts line"]:
    chosen = rng.choice(len(known), count, replace=False)
    words = rng.integers(len(WORDS), size=count)
    text = "".join(f"{known[i]} likes {WORDS[word]};" for i, word in zip(chosen, words, strict=True))
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32).reshape(count, LINE)


def episodes(seed: int, index: int, batch: int, length: int) -> Int32[np.ndarray, "B window"]:
    """Training windows of ``length`` + 1 bytes: facts in the first half, the same facts in another order in the second.

    ``length``: a multiple of two lines.
    """
    facts = draw_facts(seed, index, batch, length // (2 * LINE), heldout=False)
    whole = np.concatenate([facts.told.reshape(batch, length // 2), facts.asked.reshape(batch, length // 2)], axis=1)
    return np.concatenate([whole, np.full((batch, 1), ord("\n"), np.int32)], axis=1)
