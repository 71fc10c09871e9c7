"""One block of C tokens of the recurrence, exactly and in matrix products (SPEC 1.2).

``coefficients`` turns the gates into decays, ``advance`` writes a block into one linear memory, ``recall`` reads it.
``recurrence.gated_delta`` scans blocks; ``self_modifying`` calls the parts to share decays and inverses between
memories. Products and solves are those of ``products.py`` and ``triangular.py``.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp

from hope_jax.memory.products import nn, nt, split, tn
from hope_jax.memory.triangular import decay_products, solve_unit_lower
from hope_jax.types import Array, Float

Read = Literal["before", "after"]


class Share(NamedTuple):
    """What is left at some times R of the incoming memory and momentum, and of each token's erase and write."""

    memory: Float[Array, "*R"]
    erases: Float[Array, "*R C"]
    momentum: Float[Array, "*R"]
    writes: Float[Array, "*R C"]


class Coefficients(NamedTuple):
    """Decays of one block (SPEC 1.2), sliced once: every user of a slice adds a whole-matrix cotangent otherwise.

    Attributes:
      before, after: the memory at t - 1 and at t, for each token t of the block (R = C).
      last: the memory after the block.
      surprise: the momentum after the block (``memory`` and ``erases`` unused); None without momentum.
    """

    before: Share
    after: Share
    last: Share
    surprise: Share | None


class Written(NamedTuple):
    """A block's erases E_s = -a_s M_{s-1} k_s [C,V] (None without erase), and memory and momentum after it."""

    erased: Float[Array, "C V"] | None
    memory: Float[Array, "V K"]
    momentum: Float[Array, "V K"] | None


def coefficients(
    retention: Float[Array, " C"], momentum_decay: Float[Array, " C"] | None, active: Float[Array, " C"] | None
) -> Coefficients:
    """Decays of one block. Memories with the same gates share them."""
    decay = decay_products(retention)
    surprise, carry = None, decay
    if momentum_decay is not None:
        products = decay_products(momentum_decay)
        gain = decay[:, 1:] if active is None else decay[:, 1:] * active[None, :]
        carry = nn(gain, products[1:])
        surprise = _share(products, products, -1)
    before, after = (_share(decay, carry, rows) for rows in (slice(None, -1), slice(1, None)))
    return Coefficients(before, after, _share(decay, carry, -1), surprise)


def _share(decay: Float[Array, "R R"], carry: Float[Array, "R R"], rows: slice | int) -> Share:
    """Rows are times 0..C; column 0 belongs to what was there before the block, column s to token s."""
    return Share(decay[rows, 0], decay[rows, 1:], carry[rows, 0], carry[rows, 1:])


def erase_matrix(keys: Float[Array, "C K"], erase: Float[Array, "C G"], terms: Coefficients) -> Float[Array, "G C C"]:
    """L of the block's triangular systems (I + L) E = right, for one linear memory (SPEC 1.2)."""
    return erase.T[:, :, None] * (terms.before.erases * nt(keys, keys))[None]


def advance(
    memory: Float[Array, "V K"],
    momentum: Float[Array, "V K"] | None,
    base: Float[Array, "V K"] | None,
    keys: Float[Array, "C K"],
    writes: Float[Array, "C V"],
    erase: Float[Array, "C G"] | None,
    terms: Coefficients,
    inverse: Float[Array, "G C C"] | None = None,
    rows: tuple[int, ...] | None = None,
) -> Written:
    """Write one block exactly. Inactive tokens must come with zero ``writes`` and ``erase``.

    The memory's V rows are G parts of so many ``rows``, each with its own erase (None: one part): memories that share
    their keys are one memory.
    ``inverse`` is that of I + ``erase_matrix``, for callers who invert those of many memories at once.
    """
    added, last = terms.last.writes[:, None] * writes, terms.last
    erased = None
    if erase is not None:
        standing = _standing(memory, momentum, base, keys, writes, keys, terms.before)
        erased = -_solve(erase_matrix(keys, erase, terms), standing, erase, inverse, rows or standing.shape[1:])
        added += last.erases[:, None] * erased
    memory = last.memory * memory + tn(added, keys)
    if terms.surprise is None or momentum is None:
        return Written(erased, memory, None)
    memory += last.momentum * momentum
    momentum = terms.surprise.momentum * momentum + tn(terms.surprise.writes[:, None] * writes, keys)
    return Written(erased, memory, momentum)


def _solve(
    lower: Array,
    standing: Float[Array, "C V"],
    erase: Float[Array, "C G"],
    inverse: Array | None,
    rows: tuple[int, ...],
) -> Float[Array, "C V"]:
    """What is erased, part by part of the memory's rows."""
    solved = []
    for part, right in enumerate(split(standing, rows, axis=1)):
        one = None if inverse is None else inverse[part]
        solved.append(solve_unit_lower(lower[part], erase[:, part, None] * right, one))
    return jnp.concatenate(solved, axis=1) if len(solved) > 1 else solved[0]


def recall(
    memory: Float[Array, "V K"],
    momentum: Float[Array, "V K"] | None,
    base: Float[Array, "V K"] | None,
    keys: Float[Array, "C K"],
    writes: Float[Array, "C V"],
    erased: Float[Array, "C V"] | None,
    queries: Float[Array, "C K"],
    terms: Coefficients,
    read: Read,
) -> Float[Array, "C V"]:
    """Read one block: M_{t-1} q_t or M_t q_t; ``memory`` and ``momentum`` are those before the block."""
    share = terms.before if read == "before" else terms.after
    reads = _standing(memory, momentum, base, keys, writes, queries, share)
    if erased is None:
        return reads
    return reads + nn(share.erases * nt(queries, keys), erased)


def _standing(memory, momentum, base, keys, writes, inputs, share: Share):
    """The memory of every time, as it were without the block's erases, applied to that time's input."""
    value = share.memory[:, None] * nt(inputs, memory) + nn(share.writes * nt(inputs, keys), writes)
    if momentum is not None:
        value += share.momentum[:, None] * nt(inputs, momentum)
    if base is not None:
        value += nt(inputs, base)
    return value
