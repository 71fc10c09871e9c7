"""How exactly the backward pass keeps the states of memories between two pieces of a sequence, and how many of them.

A loop over pieces, such as the chunks of a memory, keeps the state before each of them, and its backward pass computes
one piece after another again from there. These states are most of what training a memory keeps. They may be kept in
bfloat16, at half the bytes: the forward pass, and so the loss, stays exactly as it is, and the backward pass computes
each piece again from a state that was rounded (8 bits of precision). Only the gradient changes. Every state is rounded
once, in nested loops what an inner one starts from, too; what that changes in the gradient goes on through the pieces
before.

The loop may also be nested, with about sqrt(n) of n pieces in each inner loop: the states before the inner loops are
kept and, of one at a time, those inside it, 2 sqrt(n) instead of n. The pieces are then computed one time more.

The loops are those of ``levels.py``, ``memory/kernels`` and ``nn/token_scan.py`` and, with ``remat_every``, that of
``train/step.py``, which is never nested. The loop over segments (``nn/segments.py``) keeps its states exactly. A
gradient of such a gradient would be wrong, because bits have no derivative; ``train/remat.py`` refuses what would need
one.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxpr_as_fun

from hope_jax.errors import check_word

RematStates = Literal["exact", "bfloat16"]
"""How states between two pieces are kept for the backward pass: as they are, or rounded to bfloat16."""

Step = Callable[[Any, Any], tuple[Any, Any]]
_chosen: contextvars.ContextVar[RematStates] = contextvars.ContextVar("remat_states", default="exact")
_nested: contextvars.ContextVar[bool] = contextvars.ContextVar("nested", default=False)


@contextlib.contextmanager
def keeping(states: RematStates, nested: bool = False) -> Iterator[None]:
    """Loops that are traced in here keep their states so; a program that ``jax.jit`` has traced before stays as it is.

    ``nested``: loops whose states are larger than what a piece reads become loops of loops (``pieces_of_inner_loop``).

    Raises UserError for an unknown word.
    """
    check_word("remat_states", states, RematStates)
    before = _chosen.set(states), _nested.set(nested)
    try:
        yield
    finally:
        _chosen.reset(before[0])
        _nested.reset(before[1])


def pieces_of_inner_loop(count: int) -> int:
    """Of ``count`` pieces: the largest divisor up to their root; 1 (no nesting) where that does not halve states."""
    size = next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)
    return size if 2 * (size + count // size) <= count else 1


def scan_pieces(step: Step, state: Any, pieces: Any, remat: Callable[[Step], Step] = jax.checkpoint) -> tuple[Any, Any]:
    """``lax.scan(step, state, pieces)``, whose backward pass computes the pieces a second time, one after another.

    ``remat`` does that where states are kept as they are. In bfloat16 nothing is kept besides them, whatever ``remat``
    would save; there is no forward mode (``jax.jvp``). In nested loops the pieces are computed a third time.
    """
    count = jax.tree.leaves(pieces)[0].shape[0]
    size = pieces_of_inner_loop(count) if _nested.get() and count * _bytes(state) > _bytes(pieces) else 1
    if size == 1:
        return _scan(step, state, pieces, remat)

    def inner(state: Any, some: Any) -> tuple[Any, Any]:
        return _scan(step, state, some, remat)

    cut = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), pieces)
    state, outputs = _scan(inner, state, cut, functools.partial(jax.checkpoint, prevent_cse=False))
    return state, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _scan(step: Step, state: Any, pieces: Any, remat: Callable[[Step], Step]) -> tuple[Any, Any]:
    """``scan_pieces`` in one loop."""
    if _chosen.get() == "exact":
        return lax.scan(remat(step), state, pieces)
    # What ``step`` uses from outside becomes an argument, so that it is differentiated, too.
    first = jax.tree.map(lambda x: x[0], pieces)
    program, shapes = jax.make_jaxpr(step, return_shape=True)(state, first)

    def run(outside: Any, state: Any, piece: Any) -> tuple[Any, Any]:
        leaves = jaxpr_as_fun(program.replace(consts=outside))(*jax.tree.leaves((state, piece)))
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    given, dtypes = (program.consts, state, pieces), jax.tree.map(lambda x: x.dtype, state)
    return _from_bfloat16(run, dtypes)(_floats(given), _others(given))


def _from_bfloat16(run: Callable[..., tuple[Any, Any]], dtypes: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The loop of ``run(outside, state, piece)``, of the floats and the other arrays of (outside, state, pieces).

    ``dtypes``: of the leaves of a state.
    """

    def loop(floats: Any, others: Any) -> tuple[Any, Any]:
        outside, state, pieces = _joined(floats, others)
        return lax.scan(functools.partial(run, outside), state, pieces)

    def forward(floats: Any, others: Any) -> tuple[tuple[Any, Any], Any]:
        outside, state, pieces = _joined(floats, others)

        def step(state: Any, piece: Any) -> tuple[Any, Any]:
            after, output = run(outside, state, piece)
            return after, (output, jax.tree.map(_narrow, state))

        end, (outputs, states) = lax.scan(step, state, pieces)
        return (end, outputs), (outside, states, pieces)

    def backward(kept: Any, cotangents: Any) -> tuple[Any, None]:
        outside, states, pieces = kept

        def step(sums: tuple[Any, Any], one: Any) -> tuple[tuple[Any, Any], Any]:
            (of_state, of_outside), (state, piece, of_output) = sums, one
            given = outside, jax.tree.map(_wide, state, dtypes), piece
            floats, others = _floats(given), _others(given)
            _, pull = jax.vjp(lambda floats: _floats(run(*_joined(floats, others))), floats)
            ((more, of_state, of_piece),) = pull((of_state, of_output))
            return (of_state, jax.tree.map(jnp.add, of_outside, more)), of_piece

        of_end, of_outputs = _floats(cotangents)
        nothing = jax.tree.map(jnp.zeros_like, _floats(outside))
        sums, of_pieces = lax.scan(step, (of_end, nothing), (states, pieces, of_outputs), reverse=True)
        return (sums[1], sums[0], of_pieces), None

    exact = jax.custom_vjp(loop)
    exact.defvjp(forward, backward)
    return exact


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _floats(tree: Any) -> Any:
    """The tree with None in the place of what is no float and has no gradient."""
    return jax.tree.map(lambda x: x if _is_float(x) else None, tree)


def _others(tree: Any) -> Any:
    """The tree with None in the place of floats."""
    return jax.tree.map(lambda x: None if _is_float(x) else x, tree)


def _joined(floats: Any, others: Any) -> Any:
    """The reverse of ``_floats`` and ``_others``."""
    return jax.tree.map(lambda x, y: y if x is None else x, floats, others, is_leaf=lambda x: x is None)


def _narrow(x: Any) -> Any:
    """Floats of more than 16 bits as the bits of bfloat16: rounded numbers may be kept in float32 by XLA, on a CPU."""
    if not _is_float(x) or x.dtype.itemsize == 2:
        return x
    return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)


def _wide(x: Any, dtype: Any) -> Any:
    """What ``_narrow`` has made of an array of that dtype, as such an array."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, jnp.bfloat16).astype(dtype)
