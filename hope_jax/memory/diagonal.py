"""The recurrence with a retention for every key channel, and an erase that reads at one key and clears another.

    M_t = M_{t-1} (diag(r_t) - b_t c_t^T) + w_t k_t^T

RWKV-7 (arXiv 2503.14456), Kimi Delta Attention and gated linear attention are settings of it. ``gated_delta`` comes
here when its retention is [T,K]; with all channels of r_t equal, b = a k and c = k it is the recurrence of
``recurrence.py``. Memories are kernels here, [K,V], the transposes of the equations' M.

Block form. Let x_t be what token t looks up (b_t or q_t) and y_s where token s writes (c_s or k_s). A block needs the
scores ``sum_d x_t[d] y_s[d] prod_{s<u<t} r_u[d]``, x_t decayed since the block began, and y_s decayed until it ends.
Pieces of 1, 2, 4, ... tokens are merged in pairs: for t in the second piece and s in the first, the product over u is
cut at the border between them, which leaves one factor for x_t and one for y_s. Factors are products of retentions:
none is above 1, nothing is divided and no logarithm is taken, so every retention is exact, 0 included.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hope_jax.errors import UserError
from hope_jax.levels import Loop
from hope_jax.memory.decays import ReadTime
from hope_jax.memory.kernels import Impl, Products, chunk_loop, inside_kernel, products_of
from hope_jax.memory.products import transpose
from hope_jax.types import Array, Float


class Erase(NamedTuple):
    """An erase ``M_{t-1} b_t c_t^T``: the memory's answer to one key is subtracted at another.

    Attributes:
      queries: b_t, the key that is looked up.
      keys: c_t, the key at which the answer is subtracted; its size includes the strength of the erase.
    """

    queries: Float[Array, "*T K"]
    keys: Float[Array, "*T K"]


class DiagonalTokens(NamedTuple):
    """T tokens, or a single one without an axis T; ``erase`` is None where nothing is erased."""

    keys: Float[Array, "*T K"]
    writes: Float[Array, "*T V"]
    queries: Float[Array, "*T K"]
    retention: Float[Array, "*T K"]
    erase: Erase | None


def check_diagonal(keys: Array, gates: dict[str, Any], momentum: Any, base: Any) -> None:
    """Raise UserError unless the gates of ``gated_delta`` fit a retention [T,K], which has no momentum and no base."""
    retention, erase = gates["retention"], gates["erase"]
    if jnp.shape(retention) != keys.shape:
        expected = f"one number per token and key channel, {keys.shape}"
        raise UserError(f"retention has shape {jnp.shape(retention)}; expected {expected}, with an Erase of two keys")
    for name, argument in dict(momentum=momentum, momentum_decay=gates["momentum_decay"], base=base).items():
        if argument is not None:
            raise UserError(f"{name} is given with a retention per key channel; leave it None, or give retention [T]")
    if isinstance(erase, Erase):
        for name, part in erase._asdict().items():
            if jnp.shape(part) != keys.shape:
                raise UserError(f"erase.{name} has shape {jnp.shape(part)}; expected that of the keys, {keys.shape}")
    elif erase is not None and jnp.shape(erase) != keys.shape[:1]:
        expected = f"one number per token, {keys.shape[:1]}, or an Erase of two keys"
        raise UserError(f"erase has shape {jnp.shape(erase)}; expected {expected}")


def diagonal_delta(
    memory: Float[Array, "V K"],
    keys: Float[Array, "T K"],
    writes: Float[Array, "T V"],
    queries: Float[Array, "T K"] | None,
    retention: Float[Array, "T K"],
    erase: Float[Array, " T"] | Erase | None,
    active: Float[Array, " T"] | None,
    time: ReadTime,
    impl: Impl,
    block: int,
) -> tuple[Float[Array, "T V"] | None, Float[Array, "V K"]]:
    """The reads and the final memory; the arguments are those of ``gated_delta``."""
    dtype = jnp.promote_types(memory.dtype, jnp.float32)
    if erase is not None and not isinstance(erase, Erase):
        erase = Erase(erase[:, None] * keys, keys)
    # Without queries the keys are looked up, and the reads are dropped.
    tokens = DiagonalTokens(keys, writes, keys if queries is None else queries, retention, erase)
    if active is not None:
        tokens = _idle(tokens, lax.stop_gradient(active)[:, None])
    kernel, tokens = jax.tree.map(lambda x: x.astype(dtype), (transpose(memory), tokens))
    if impl == "sequential":
        kernel, reads = lax.scan(functools.partial(_token_step, time), kernel, tokens)
    else:

        def step(memory: Array, tokens: DiagonalTokens) -> tuple[Array, Array]:
            # Asked for in here: a kernel has other products, and is traced with them.
            return _block_step(products_of(inside_kernel(impl)), time, memory, tokens)

        kernel, reads = _chunked(step, chunk_loop(impl), block, kernel, tokens)
    return None if queries is None else reads, transpose(kernel)


def _idle(tokens: DiagonalTokens, active: Float[Array, "T 1"]) -> DiagonalTokens:
    erase = tokens.erase
    erase = None if erase is None else erase._replace(queries=active * erase.queries)
    retention = active * tokens.retention + (1 - active)
    return tokens._replace(writes=active * tokens.writes, retention=retention, erase=erase)


def _token_step(time: ReadTime, memory: Float[Array, "K V"], token: DiagonalTokens) -> tuple[Array, Array]:
    """The definition, at one token."""
    after = token.retention[:, None] * memory + jnp.outer(token.keys, token.writes)
    if token.erase is not None:
        after -= jnp.outer(token.erase.keys, token.erase.queries @ memory)
    return after, token.queries @ (memory if time == "before" else after)


def _chunked(
    step: Callable[[Array, DiagonalTokens], tuple[Array, Array]],
    loop: Loop,
    block: int,
    memory: Float[Array, "K V"],
    tokens: DiagonalTokens,
) -> tuple[Array, Array]:
    length = len(tokens.keys)
    size = min(_power_of_two(block), _power_of_two(length))
    blocks = jax.tree.map(lambda x: x.reshape(-1, size, x.shape[-1]), _padded(tokens, -length % size))
    memory, reads = loop(step, memory, blocks)
    return memory, reads.reshape(-1, reads.shape[-1])[:length]


def _power_of_two(count: int) -> int:
    """The smallest power of two that is not below ``count``."""
    return 1 << (count - 1).bit_length()


def _padded(tokens: DiagonalTokens, extra: int) -> DiagonalTokens:
    """``extra`` tokens at the end that change nothing."""
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, extra), (0, 0))), tokens)
    return padded._replace(retention=jnp.pad(tokens.retention, ((0, extra), (0, 0)), constant_values=1))


class Pieces(NamedTuple):
    """N pieces of P tokens each, one after another, whose tokens have R rows x_t and S columns y_s.

    Attributes:
      rows: x_t, decayed since the start of its piece until just before t.
      columns: y_s, decayed after s until the end of its piece.
      scores: products of a piece's rows with its columns of earlier tokens, decayed in between; 0 for others.
      retention: share that is left after the whole piece.
    """

    rows: Float[Array, "N P R K"]
    columns: Float[Array, "N P S K"]
    scores: Float[Array, "N PR PS"]
    retention: Float[Array, "N K"]


def _halves(x: Array) -> list[Array]:
    """The first and the second piece of every pair: by a split, whose cotangents are joined at once."""
    pairs = x.reshape(-1, 2, *x.shape[1:])
    return [jnp.squeeze(half, 1) for half in jnp.split(pairs, 2, axis=1)]


def _merged(products: Products, pieces: Pieces) -> Pieces:
    """Half as many pieces, each of two neighbours."""
    first, second = (Pieces(*parts) for parts in zip(*map(_halves, pieces), strict=True))
    rows, columns = (x.reshape(len(x), -1, x.shape[-1]) for x in (second.rows, first.columns))
    corner = products.matmul_nt(rows, columns)
    top = jnp.concatenate([first.scores, jnp.zeros_like(corner)], axis=2)
    return Pieces(
        jnp.concatenate([first.rows, second.rows * first.retention[:, None, None]], axis=1),
        jnp.concatenate([first.columns * second.retention[:, None, None], second.columns], axis=1),
        jnp.concatenate([top, jnp.concatenate([corner, second.scores], axis=2)], axis=1),
        first.retention * second.retention,
    )


def _as_one_piece(products: Products, tokens: DiagonalTokens, time: ReadTime) -> Pieces:
    """The block as a single piece. Rows are b_t, if there is an erase, and q_t; columns c_s, likewise, and k_s."""
    keys, _, queries, retention, erase = tokens
    # A read after the token's own write is a read before it with r_t q_t, plus the write itself.
    rows = [queries if time == "before" else retention * queries]
    columns = [keys]
    if erase is not None:
        rows, columns = [erase.queries, *rows], [erase.keys, *columns]
    rows, columns = jnp.stack(rows, axis=1), jnp.stack(columns, axis=1)
    scores = jnp.zeros((len(keys), rows.shape[1], columns.shape[1]), keys.dtype)
    if time == "after":
        scores = scores.at[:, -1].set(jnp.sum(columns * queries[:, None], axis=-1))
    pieces = Pieces(rows[:, None], columns[:, None], scores, retention)
    while len(pieces.rows) > 1:
        pieces = _merged(products, pieces)
    return pieces


def _block_step(
    products: Products, time: ReadTime, memory: Float[Array, "K V"], tokens: DiagonalTokens
) -> tuple[Float[Array, "K V"], Float[Array, "C V"]]:
    """One block of C tokens: the erases E_t = -M_{t-1} b_t solve a triangular system, as in ``chunked.py``."""
    rows, columns, scores, retention = (x[0] for x in _as_one_piece(products, tokens, time))
    count, kinds, features = rows.shape
    found = products.matmul(rows.reshape(-1, features), memory).reshape(count, kinds, -1)
    scores, values = scores.reshape(count, kinds, count, kinds), tokens.writes[:, None]
    if tokens.erase is not None:
        right = found[:, 0] + products.matmul(scores[:, 0, :, 1], tokens.writes)
        values = jnp.stack([-_solved(products, scores[:, 0, :, 0], right), tokens.writes], axis=1)
    values = values.reshape(count * kinds, -1)
    reads = found[:, -1] + products.matmul(scores[:, -1].reshape(count, -1), values)
    added = products.matmul_tn(columns.reshape(-1, features), values)
    return retention[:, None] * memory + added, reads


def _solved(products: Products, lower: Float[Array, "C C"], right: Float[Array, "C V"]) -> Float[Array, "C V"]:
    """X with (I + lower) X = right."""
    return products.solve(lower, jnp.ones(len(lower), lower.dtype), right, products.inverse(lower[None])[0])
