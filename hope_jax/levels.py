"""One schedule for everything that has an update period (Nested Learning, section 3).

A level is a set of parameters that share one update period, counted in tokens (or optimizer steps). ``scan_levels``
runs a function over a sequence cut on the grid of the fastest level, so that any cut of the sequence into calls sees
the same updates. Anchors (``memory/rule.py``) are refreshed by it, and levels learn by it (``context/writes.py``).
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from hope_jax.errors import UserError, whole
from hope_jax.kept import scan_pieces
from hope_jax.types import Array, Bool, Count, Float, Int

Due = Bool[Array, ""] | bool
Active = Float[Array, " C"] | None
RunChunk = Callable[[Any, Any, Active, tuple[Due, ...]], tuple[Any, Any]]
Loop = Callable[[Callable[..., tuple[Any, Any]], Any, Any], tuple[Any, Any]]
"""``(step, state, chunks) -> (state, outputs)``: ``lax.scan``, or what computes the same."""


@dataclass(frozen=True)
class Level:
    """An update period in tokens; larger is slower."""

    period: int

    def __post_init__(self) -> None:
        whole("a level's period", self.period, 1, "tokens")


def save_for_backward(x: Array) -> Array:
    """``x``, which the backward pass of ``scan_levels`` does not compute again: for small arrays that cost much."""
    return checkpoint_name(x, "saved for backward")


# The backward pass computes everything again, except what the function saves for it.
_remat = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("saved for backward"))


def due(step: Int[Array, ""] | np.ndarray | int, period: int) -> Bool[Array, ""]:
    """True at multiples of the period, step 0 included."""
    return jnp.asarray(step) % period == 0


def check_multiples(periods: Sequence[int]) -> None:
    """Raise UserError unless every period is a multiple of the faster one before it."""
    for faster, slower in itertools.pairwise(periods):
        if slower % faster:
            raise UserError(f"periods {tuple(periods)} do not nest; make {slower} a multiple of {faster}")


def scan_levels(
    run_chunk: RunChunk,
    state: Any,
    tokens: Any,
    *,
    position: Int[Array, ""] | np.ndarray,
    periods: tuple[int, ...],
    count: Count = None,
    kernel: Loop | None = None,
) -> tuple[Any, Any]:
    """Run ``run_chunk`` over T >= 1 tokens, one call per period of the fastest level: ``(state, outputs)``.

    Args:
      run_chunk: ``(state, tokens, active, due) -> (state, outputs)``; tokens and outputs are pytrees with leading
        axis C, ``active`` [C] is 1 for real tokens (None: all are), and ``due[i]`` says that level i updates before
        the first of them (plain True where that is known beforehand). It must leave the state unchanged by inactive
        tokens. Rematerialised in the backward pass.
      state: pytree carried along.
      tokens: pytree with leading axis T.
      position: tokens seen before this call; the grid is that of absolute positions. A numpy value (a fresh sequence)
        is known to the compiler, and whole periods then need no padding; the result is the same.
      periods: of every level, in tokens; all multiples of the smallest one.
      count: only the first ``count`` tokens are real, the others are padding and inactive; None: all are real.
      kernel: runs whole periods of a single level in the place of ``lax.scan``.
    """
    length, fastest = jax.tree.leaves(tokens)[0].shape[0], min(periods)
    if length == 1 and count is None:  # decoding: a chunk of one token needs no grid
        return run_chunk(state, tokens, None, tuple(due(position, p) for p in periods))
    known = isinstance(position, np.ndarray)
    if known and count is None and position % fastest == 0 and length % fastest == 0:
        if kernel is not None and set(periods) == {fastest}:
            return _periods_in(kernel, run_chunk, state, tokens, periods)
        return scan_periods(run_chunk, state, tokens, position=int(position), periods=periods, remat=_remat)
    real = length if count is None else count
    return _scan_anywhere(run_chunk, state, tokens, jnp.asarray(position), periods, real)


def scan_periods(
    run_chunk: RunChunk,
    state: Any,
    tokens: Any,
    *,
    position: Int[Array, ""] | int,
    periods: tuple[int, ...],
    remat: Callable[[Any], Any] = jax.checkpoint,
) -> tuple[Any, Any]:
    """``scan_levels`` over whole periods of the fastest level from a multiple of it: nothing is padded.

    The loops are nested, a slower level's around a faster one's, and each is rematerialised: the backward pass keeps
    the states at the ends of the slow loops and, of one at a time, those inside it. The default ``remat`` computes
    again even what ``run_chunk`` saves (``save_for_backward``).
    """
    fastest = min(periods)
    chunks = jax.tree.map(lambda x: x.reshape(-1, fastest, *x.shape[1:]), tokens)
    starts = position + fastest * jnp.arange(jax.tree.leaves(chunks)[0].shape[0])

    def step(state, one):
        start, chunk = one
        return run_chunk(state, chunk, None, tuple(p == fastest or due(start, p) for p in periods))

    slower = sorted({p // fastest for p in periods if p > fastest}, reverse=True)
    state, outputs = _nested_scan(step, state, (starts, chunks), slower, remat)
    return state, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)


def _periods_in(
    kernel: Loop, run_chunk: RunChunk, state: Any, tokens: Any, periods: tuple[int, ...]
) -> tuple[Any, Any]:
    """Whole periods of one level, from a multiple of it."""
    chunks = jax.tree.map(lambda x: x.reshape(-1, periods[0], *x.shape[1:]), tokens)
    state, outputs = kernel(lambda state, chunk: run_chunk(state, chunk, None, (True,) * len(periods)), state, chunks)
    return state, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)


def _nested_scan(step: Callable[[Any, Any], tuple[Any, Any]], state: Any, each: Any, groups: list[int], remat: Any):
    """``lax.scan`` in loops of ``groups`` steps, the largest outside; what does not fill a loop comes after it."""
    count = jax.tree.leaves(each)[0].shape[0]
    while groups and count <= groups[0]:
        groups = groups[1:]
    if not groups:
        return scan_pieces(step, state, each, remat)
    size, whole = groups[0], count - count % groups[0]

    def loop(state, some):
        return _nested_scan(step, state, some, groups[1:], remat)

    first = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), each)
    state, outputs = scan_pieces(loop, state, first, remat)
    outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
    if whole == count:
        return state, outputs
    state, others = _nested_scan(step, state, jax.tree.map(lambda x: x[whole:], each), groups[1:], remat)
    return state, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), outputs, others)


def _scan_anywhere(
    run_chunk: RunChunk, state: Any, tokens: Any, position: Array, periods: tuple[int, ...], real: Array | int
):
    """Tokens placed on the grid at the offset of the first one; what is around the ``real`` ones is inactive.

    Rows after the last real token are not computed. Where the first token begins a period and the tokens fill whole
    periods, the last row is one.
    """
    length, fastest = jax.tree.leaves(tokens)[0].shape[0], min(periods)
    rows = (length + 2 * fastest - 2) // fastest  # enough for any offset inside the first period
    offset = position % fastest
    grid = jax.tree.map(lambda x: _on_grid(x, offset, rows, fastest), tokens)
    active = _on_grid((jnp.arange(length) < real).astype(jnp.float32), offset, rows, fastest)

    @_remat
    def step(state, one):
        index, chunk, on = one
        start = position - offset + index * fastest
        # A level is refreshed by the call that reads the first token of its period.
        here = (start >= position) & (start < position + real)
        return run_chunk(state, chunk, on, tuple(here & due(start, p) for p in periods))

    def step_or_skip(state, one):
        outputs = jax.eval_shape(step, state, one)[1]  # traced once, as JAX caches the trace of a checkpoint
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)
        return lax.cond(one[0] * fastest < offset + real, step, lambda state, _: (state, nothing), state, one)

    # A checkpoint around the condition, too: else what both branches use is kept for every row.
    run = step if rows == 1 else step_or_skip
    state, outputs = scan_pieces(run, state, (jnp.arange(rows), grid, active), _remat)
    outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
    return state, jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, offset, length, axis=0), outputs)


def _on_grid(x: Array, offset: Int[Array, ""], rows: int, width: int) -> Array:
    """[T, ...] -> [rows, width, ...] with the first token at ``offset`` and zeros around."""
    room = jnp.zeros((rows * width, *x.shape[1:]), x.dtype)
    placed = lax.dynamic_update_slice_in_dim(room, x, offset, axis=0)
    return placed.reshape(rows, width, *x.shape[1:])
