"""One chunk of C tokens, written and read exactly in matrix products (SPEC 1.2).

``chunk`` does it for any number of linear memories that share their tokens' retention and momentum decay:
``gated_delta`` has one, a multi-layer memory one for each layer, Hope those of all its memories. Memories are kernels
here, [K,V], the transposes of the equations' M. A ``Linear`` holds one memory, or those of N boxes in one of two forms:

* side by side, [K, N*F]: boxes with the same keys. Their products with the keys and their updates are one product.
* stacked, [N,K,V]: boxes of one shape with keys of their own.

``chunk`` is a pure function of (weights, tokens of the chunk) without constants, which a kernel can run.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.memory.decays import Coefficients, ReadTime, Share, Shared, chunk_coefficients
from hope_jax.memory.kernels import Products
from hope_jax.types import Array, Float


class Linear(NamedTuple):
    """Weights of linear memories before a token: running, momentum (None: no momentum) and base (None: zero).

    ``base`` is read and erased together with ``memory`` but does not change.
    """

    memory: Float[Array, "*N K V"]
    momentum: Float[Array, "*N K V"] | None = None
    base: Float[Array, "*N K V"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Write:
    """Writes and erases of C tokens in a ``Linear``. Inactive tokens write and erase nothing.

    Attributes:
      keys: k_t, [C,K], or [N,C,K] for boxes that are stacked; boxes that lie side by side have the same.
      writes: w_t, [C,V], or [N,C,F] for N boxes.
      erase: the strength a_t of the erase, [C] or [N,C]; None: no erase.
      memory_at_keys: ``Linear.memory`` applied to the keys, [C,V] or [N,C,V], if that is known already.
      systems: for boxes that lie side by side, the first box with the same erase; such boxes share a triangular system.
    """

    keys: Any  # not typed by shape: a token alone has no axis C, and JAX fills trees with other things than arrays
    writes: Any
    erase: Any
    memory_at_keys: Any = None
    systems: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})


class Tokens(NamedTuple):
    """The writes into each ``Linear``, what all memories share, and the queries of the tokens, any pytree."""

    writes: list[Write]
    shared: Shared
    queries: Any


Lookup = Callable[..., Array]
"""``lookup(i, inputs)``: the first box of the i-th ``Linear`` at each token's time, applied to its input.

The third argument is ``Linear.memory`` before the chunk, applied to the inputs, if it is known already.
"""
Read = Callable[[Lookup, Any], Any]
"""``read(lookup, queries)`` returns results of lookups."""


def chunk(
    products: Products, linears: Sequence[Linear], tokens: Tokens, read: Read, time: ReadTime
) -> tuple[list[Linear], Any]:
    """Write C tokens into every memory, and read: before or after a token's own write."""
    writes, shared, queries = tokens
    coefficients = chunk_coefficients(products, shared, time)
    grams = [products.gram(write.keys) for write in writes]
    inverses = _inverses(products, coefficients.before, writes, grams)
    ends, erased = [], []
    write_one = functools.partial(_write, products, coefficients)
    for linear, write, gram, inverse in zip(linears, writes, grams, inverses, strict=True):
        write_each = jax.vmap(write_one) if linear.memory.ndim == 3 else write_one
        end, own = write_each(linear, write, gram, inverse)
        ends.append(end)
        erased.append(own)

    def lookup(index: int, inputs: Array, at_inputs: Array | None = None) -> Array:
        write, weights = writes[index], first_box(linears[index], writes[index].writes.shape[-1])
        keys = write.keys[0] if write.keys.ndim == 3 else write.keys
        written, own = jax.tree.map(lambda x: x[0] if x.ndim == 3 else x, (write.writes, erased[index]))
        return _read(products, coefficients.read, weights, at_inputs, keys, written, own, inputs)

    return ends, read(lookup, queries)


def side_by_side(boxes: Float[Array, "*N R F"]) -> Float[Array, "R V"]:
    """Columns of boxes next to each other, V = N F; of a single box as they are."""
    return boxes if boxes.ndim == 2 else jnp.moveaxis(boxes, 0, 1).reshape(boxes.shape[1], -1)


def apart(columns: Float[Array, "R V"], count: int) -> Float[Array, "N R F"]:
    """Columns of boxes next to each other, box by box: the reverse of ``side_by_side``."""
    return jnp.moveaxis(columns.reshape(len(columns), count, -1), 1, 0)


def first_box(linear: Linear, features: int) -> Linear:
    """The weights of the first box, which has that many columns."""
    if linear.memory.ndim == 3:
        return jax.tree.map(lambda x: x[0], linear)
    return jax.tree.map(lambda x: x[:, :features], linear)


def _inverses(
    products: Products, before: Share, writes: Sequence[Write], grams: Sequence[Array]
) -> list[Float[Array, "*N C C"] | None]:
    """(I + L diag(a))^-1 of every box, all from one sequence of products; None without erase.

    The system is (I + L diag(a)) H = ``_without_erases``, with L = ``before.erases`` * gram, and H the memory at each
    key when its token comes, M_{s-1} k_s. The erases are E = -diag(a) H (SPEC 1.2 solves for E: its rows are scaled
    where here the columns are).
    """
    lowers = [_lower(before, write, gram) for write, gram in zip(writes, grams, strict=True) if write.erase is not None]
    if not lowers:
        return [None] * len(writes)
    cuts = np.cumsum([len(lower) for lower in lowers])[:-1]
    found = iter(jnp.split(products.inverse(jnp.concatenate(lowers)), cuts))
    return [None if write.erase is None else _of_boxes(write, next(found)) for write in writes]


def _lower(before: Share, write: Write, gram: Float[Array, "*M C C"]) -> Float[Array, "S C C"]:
    """L diag(a) of the different systems of one ``Linear``."""
    erase = write.erase.reshape(-1, 1, write.erase.shape[-1])
    if write.systems:
        erase = jnp.concatenate([erase[box : box + 1] for box in dict.fromkeys(write.systems)])
    return before.erases[None] * gram.reshape(-1, *gram.shape[-2:]) * erase


def _of_boxes(write: Write, inverses: Float[Array, "S C C"]) -> Float[Array, "*N C C"]:
    """The inverse of every box."""
    if write.systems:
        order = list(dict.fromkeys(write.systems))
        return jnp.stack([inverses[order.index(box)] for box in write.systems])
    return inverses if write.erase.ndim == 2 else inverses[0]


def _write(
    products, coefficients: Coefficients, linear: Linear, write: Write, gram: Float[Array, "C C"], inverse
) -> tuple[Linear, Float[Array, "*N C F"] | None]:
    """The memories after the chunk, and each box's erases E_s = -a_s M_{s-1} k_s (None without erase)."""
    last, momentum, erased, written = coefficients.last, coefficients.momentum, None, side_by_side(write.writes)
    added = last.writes[:, None] * written
    if inverse is not None:
        erased = _erases(products, coefficients.before, linear, write, gram, inverse)
        added += last.erases[:, None] * side_by_side(erased)
    if linear.momentum is None or momentum is None:
        return linear._replace(memory=last.memory * linear.memory + products.matmul_tn(write.keys, added)), erased
    added, more = products.matmul_tn_each(write.keys, added, momentum.writes[:, None] * written)
    memory = last.memory * linear.memory + last.momentum * linear.momentum + added
    return Linear(memory, momentum.momentum * linear.momentum + more, linear.base), erased


def _erases(products, before: Share, linear: Linear, write: Write, gram, inverse) -> Float[Array, "*N C F"]:
    at_keys = write.memory_at_keys
    at_keys = products.matmul(write.keys, linear.memory) if at_keys is None else at_keys
    terms = _without_erases(before, linear, write.keys, gram, side_by_side(write.writes))
    right = before.memory[:, None] * at_keys + products.matmul_sum(*terms)
    lower = before.erases * gram

    def solve(erase, right, inverse):
        return -erase[:, None] * products.solve(lower, erase, right, inverse)

    if write.writes.ndim == 2:
        return solve(write.erase, right, inverse)
    return jax.vmap(solve)(write.erase, apart(right, len(write.writes)), inverse)


def _without_erases(share: Share, linear: Linear, inputs, scores, writes) -> list[tuple[Array, Array]]:
    """The memory at each time, applied to the input [C,K] of that time, as if the chunk erased nothing.

    Pairs (a, b): what the memory before the chunk answers is to be added to the sum of their products a b, [C,V].
    ``scores`` [C,C] are the products of inputs and keys.
    """
    terms = [(share.writes * scores, writes)]
    if linear.momentum is not None:
        terms.append((share.momentum[:, None] * inputs, linear.momentum))
    if linear.base is not None:
        terms.append((inputs, linear.base))
    return terms


def _read(products, share: Share, linear: Linear, at_inputs, keys, writes, erased, inputs) -> Float[Array, "C V"]:
    scores = products.matmul_nt(inputs, keys)
    terms = _without_erases(share, linear, inputs, scores, writes)
    if erased is not None:
        terms.append((share.erases * scores, erased))
    if at_inputs is None:
        return products.matmul_sum(*terms, (share.memory[:, None] * inputs, linear.memory))
    return share.memory[:, None] * at_inputs + products.matmul_sum(*terms)
