"""One block of C tokens of the recurrence, exactly and in matrix products (SPEC 1.2).

``coefficients`` turns the gates into decays, ``advance`` writes a block into one linear memory, ``recall`` reads it.
``recurrence.gated_delta`` scans blocks; ``self_modifying`` calls the parts to share decays and inverses between
memories. Memories are kernels here, [K,V], the transposes of the equations' M. Products and solves are those of
``products.py`` and ``triangular.py``.
"""

from typing import Literal, NamedTuple

from hope_jax.memory.products import nn, nt, tn
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
    memory: Float[Array, "K V"]
    momentum: Float[Array, "K V"] | None


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


def erase_matrix(terms: Coefficients, alike: Float[Array, "C C"], erase: Float[Array, " C"]) -> Float[Array, "C C"]:
    """L diag(a) of the block's triangular system (I + L diag(a)) H = standing, for one linear memory.

    H is what the memory has for each key when it comes, M_{s-1} k_s, so E = -diag(a) H (SPEC 1.2 solves for E itself:
    the same system, its rows scaled where here the columns are). ``alike`` is the ``gram`` of the keys.
    """
    return terms.before.erases * alike * erase[None, :]


def advance(
    terms: Coefficients,
    memory: Float[Array, "K V"],
    momentum: Float[Array, "K V"] | None,
    base: Float[Array, "K V"] | None,
    keys: Float[Array, "C K"],
    alike: Float[Array, "C C"],
    writes: Float[Array, "C V"],
    erase: Float[Array, " C"] | None,
    held: Float[Array, "C V"] | None = None,
    inverse: Float[Array, "C C"] | None = None,
) -> Written:
    """Write one block exactly. Inactive tokens must come with zero ``writes`` and ``erase``.

    ``alike`` is the ``gram`` of the keys. Where the caller has them: ``held``, ``memory`` applied to the keys, and
    ``inverse``, that of I + ``erase_matrix``.
    """
    added, last = terms.last.writes[:, None] * writes, terms.last
    erased = None
    if erase is not None:
        held = nn(keys, memory) if held is None else held
        standing = _standing(held, momentum, base, alike, writes, keys, terms.before)
        erased = -erase[:, None] * solve_unit_lower(terms.before.erases * alike, erase, standing, inverse)
        added += last.erases[:, None] * erased
    memory = last.memory * memory + tn(keys, added)
    if terms.surprise is None or momentum is None:
        return Written(erased, memory, None)
    memory += last.momentum * momentum
    momentum = terms.surprise.momentum * momentum + tn(keys, terms.surprise.writes[:, None] * writes)
    return Written(erased, memory, momentum)


def recall(
    memory: Float[Array, "K V"],
    momentum: Float[Array, "K V"] | None,
    base: Float[Array, "K V"] | None,
    keys: Float[Array, "C K"],
    writes: Float[Array, "C V"],
    erased: Float[Array, "C V"] | None,
    queries: Float[Array, "C K"],
    terms: Coefficients,
    read: Read,
) -> Float[Array, "C V"]:
    """Read one block: M_{t-1} q_t or M_t q_t; ``memory`` and ``momentum`` are those before the block."""
    share = terms.before if read == "before" else terms.after
    alike = nt(queries, keys)
    reads = _standing(nn(queries, memory), momentum, base, alike, writes, queries, share)
    return reads if erased is None else reads + nn(share.erases * alike, erased)


def _standing(held, momentum, base, alike, writes, inputs, share: Share):
    """The memory of every time, as it were without the block's erases, applied to that time's input.

    ``held`` is the memory before the block applied to the inputs, ``alike`` the inputs' products with the keys.
    """
    value = share.memory[:, None] * held + nn(share.writes * alike, writes)
    if momentum is not None:
        value += share.momentum[:, None] * nn(inputs, momentum)
    if base is not None:
        value += nn(inputs, base)
    return value
