"""Products of decays inside one chunk: the share that is left at every time (SPEC 1.2). Read ``chunked.py`` next."""

from typing import Literal, NamedTuple

import jax.numpy as jnp

from hope_jax.memory.kernels import Products
from hope_jax.memory.products import matmul, row_and_column
from hope_jax.types import Array, Float

ReadTime = Literal["before", "after"]

# Smaller factors count as 0 in log space. It is a normal float32, so 1 / (0 + FLOOR) is finite, too.
FLOOR = 1e-30


class Shared(NamedTuple):
    """What memories share at each token: alpha, beta (None: no momentum), and 1 where it is real (None: everywhere)."""

    retention: Float[Array, " C"]
    momentum_decay: Float[Array, " C"] | None
    active: Float[Array, " C"] | None = None


class Share(NamedTuple):
    """Shares that are left at some times R: of the memory and momentum before, and of each token's erase and write."""

    memory: Float[Array, "*R"]
    erases: Float[Array, "*R C"]
    momentum: Float[Array, "*R"]
    writes: Float[Array, "*R C"]


class Coefficients(NamedTuple):
    """Shares that are left at t - 1 and at the time of the read, for each token t (R = C), and after the chunk.

    ``momentum`` is for the momentum after the chunk (``memory`` and ``erases`` unused); None without momentum.
    """

    before: Share
    read: Share
    last: Share
    momentum: Share | None


def chunk_coefficients(products: Products, shared: Shared, time: ReadTime) -> Coefficients:
    """Rows of the products are times 0..C; column 0 belongs to what was there before the chunk, column s to token s.

    They are cut by splits: their cotangents are joined at once, where the cotangent of a slice is a whole matrix.
    """
    start, tokens = jnp.split(decay_products(shared.retention), [1], axis=1)
    of_memory, of_writes, momentum = (start[:, 0], tokens), (start[:, 0], tokens), None
    if shared.momentum_decay is not None:
        _, carried = jnp.split(decay_products(shared.momentum_decay), [1])
        gain = tokens if shared.active is None else tokens * shared.active[None, :]
        start, tokens = jnp.split(products.matmul(gain, carried), [1], axis=1)
        of_writes, last = (start[:, 0], tokens), carried[-1]
        momentum = Share(last[0], last[1:], last[0], last[1:])
    pieces = [jnp.split(x, [len(x) - 1]) for x in (*of_memory, *of_writes)]
    before, last = Share(*(rows for rows, _ in pieces)), Share(*(row[0] for _, row in pieces))
    after = Share(*(x[1:] for x in (*of_memory, *of_writes)))
    return Coefficients(before, before if time == "before" else after, last, momentum)


def decay_products(factors: Float[Array, " C"]) -> Float[Array, "T T"]:
    """P[t, s] = product of ``factors`` s+1..t for 0 <= s <= t <= C (T = C + 1), and 0 above the diagonal.

    Each log product is a sum of its own terms (a masked triangular matrix product, not a difference of
    cumulative sums), so nothing cancels: factors down to 0 and their gradients are exact to rounding.
    """
    count = factors.shape[0]
    rows, columns = row_and_column(count + 1)
    up_to = (columns[:, :-1] < rows[:, :-1]).astype(factors.dtype)  # token s + 1 = 1..C is at or before time t
    after = (rows[:-1] >= columns[:-1]).astype(factors.dtype)
    # The factor that differs between heads stands on the left, so that the rows of all heads make one product.
    logs = matmul(up_to * jnp.log(factors + FLOOR)[None, :], after)
    return jnp.exp(logs) * (rows >= columns).astype(factors.dtype)
