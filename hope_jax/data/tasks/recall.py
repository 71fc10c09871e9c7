"""Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): find the value bound to a key.

A context binds keys to values, and later each key comes back once; the model must predict its value. A model can only
score with what its memory holds.
"""

import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from hope_jax.errors import UserError, whole

IGNORE = -1
"""Target of positions that are not scored."""


def mqar(
    seed: int,
    index: int,
    batch: int,
    length: int,
    pairs: int,
    vocab: int = 8192,
    power_a: float = 0.01,
    random_non_queries: bool = False,
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
    """Inputs and targets of batch number `index`; the same numbers give the same batch.

    A sequence is k1 v1 k2 v2 ... and then two-token slots, most of them empty; each key stands once at the first
    token of some slot and there the target is its value, elsewhere IGNORE. Keys are distinct ids in
    1 .. vocab // 2 - 1, values distinct ids in vocab // 2 .. vocab - 1.

    Args:
        seed, index: at least 0.
        batch: B, at least 1.
        length: T, even, at least 4 * pairs.
        pairs: keys per sequence, at least 1 and fewer than vocab // 2.
        vocab: token ids are 0 .. vocab - 1.
        power_a: slot i = 1, 2, ... is chosen with probability proportional to i ** (power_a - 1), without
            replacement: 0.01 asks soon after the context, 1 anywhere.
        random_non_queries: fill empty positions with random ids of the whole vocabulary instead of 0.

    Raises:
        UserError: an argument outside its range.
    """
    _check(seed, index, batch, length, pairs, vocab, power_a)
    rng = np.random.default_rng([seed, index])
    keys = 1 + _distinct(rng, batch, pairs, vocab // 2 - 1)
    values = vocab // 2 + _distinct(rng, batch, pairs, vocab - vocab // 2)
    positions = 2 * pairs + 2 * _slots(rng, batch, pairs, (length - 2 * pairs) // 2, power_a)
    inputs = np.zeros((batch, length), np.int32)
    if random_non_queries:
        inputs[:] = rng.integers(vocab, size=inputs.shape)
    inputs[:, : 2 * pairs : 2] = keys
    inputs[:, 1 : 2 * pairs : 2] = values
    targets = np.full_like(inputs, IGNORE)
    np.put_along_axis(inputs, positions, keys, axis=1)
    np.put_along_axis(targets, positions, values, axis=1)
    return inputs, targets


def _distinct(rng: np.random.Generator, batch: int, count: int, below: int) -> Int[np.ndarray, "B pairs"]:
    """Uniform ordered draws without replacement from 0 .. below - 1."""
    if below < 4 * count:
        return rng.random((batch, below)).argsort(axis=1)[:, :count]
    # Shuffling a large vocabulary for a few ids would cost most of the time. Redrawing repeats until there are none
    # treats all ids alike, so every ordered choice is equally likely here too.
    drawn = rng.integers(below, size=(batch, count))
    while (repeated := _repeats(drawn)).any():
        drawn[repeated] = rng.integers(below, size=np.count_nonzero(repeated))
    return drawn


def _repeats(drawn: Int[np.ndarray, "B pairs"]) -> Bool[np.ndarray, "B pairs"]:
    """True where an id stands earlier in its row."""
    order = np.argsort(drawn, axis=1, kind="stable")
    ranked = np.take_along_axis(drawn, order, axis=1)
    repeated = np.zeros(drawn.shape, bool)
    np.put_along_axis(repeated, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
    return repeated


def _slots(rng: np.random.Generator, batch: int, count: int, slots: int, power_a: float) -> Int[np.ndarray, "B pairs"]:
    """Weighted draws without replacement: the first arrivals of one exponential clock per slot."""
    weights: Float[np.ndarray, " slots"] = np.arange(1, slots + 1) ** (power_a - 1.0)
    arrivals = rng.standard_exponential((batch, slots)) / weights
    return np.argsort(arrivals, axis=1)[:, :count]


def _check(seed: int, index: int, batch: int, length: int, pairs: int, vocab: int, power_a: float) -> None:
    for name, value, least in (("seed", seed, 0), ("index", index, 0), ("batch", batch, 1), ("pairs", pairs, 1)):
        whole(name, value, least)
    if length % 2 or length < 4 * pairs:
        raise UserError(f"length must be even and at least 4 * pairs = {4 * pairs}, got {length}")
    if pairs > vocab // 2 - 1:
        raise UserError(f"{pairs} pairs need a vocabulary of at least {2 * pairs + 2} ids, got {vocab}")
    if not 0 < power_a < np.inf:
        raise UserError(
            f"power_a must be positive and finite, got {power_a}: 0.01 asks soon after the context, 1 anywhere"
        )
