"""A scan over chunks as one kernel: the weights stay on the chip while a sequence is read.

``scan`` computes what ``lax.scan`` of the same step computes. On a TPU it is one launch forward and one backward for
all heads of all sequences, as ``vmap`` adds an axis to the grid of a kernel. The step is the pure function of one chunk
that the other evaluators run; the backward kernel calls ``jax.vjp`` of it, so no derivative is written by hand.

The forward kernel saves the state before every few chunks (``save_every``); the backward kernel computes the states
between them again and keeps those on the chip. Derivatives of derivatives are those of ``lax.scan``. On other platforms
the kernels are interpreted: the same numbers, but slow. ``places.py``: how arrays lie in the memory of the chip.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hope_jax.memory.kernels.inside import for_kernel
from hope_jax.memory.kernels.places import (
    Shape,
    chunked,
    chunks_of,
    get,
    get_chunk,
    get_narrow,
    is_place,
    leaves,
    one_of,
    put,
    put_chunk,
    stored,
    whole,
    wide,
    wide_shapes,
)
from hope_jax.memory.kernels.plan import Plan, Step, check
from hope_jax.types import Array

VMEM_LIMIT = 64 * 2**20  # bytes that a kernel may take of the chip's memory; 16 MiB, the default, are too few


def scan(step: Step, state: Any, chunks: Any) -> tuple[Any, Any]:
    """``lax.scan(step, state, chunks)`` as a kernel.

    Args:
      step: ``(state, chunk) -> (state, outputs)``, differentiable in reverse mode, made of operations that the
        compiler of kernels knows. Arrays that it uses from outside are differentiated, too.
      state: pytree of arrays with two axes or more.
      chunks: pytree of arrays [n,C] or [n,C,F], n chunks of C tokens each; so are the outputs. On a TPU, C is a
        multiple of 8.

    Raises:
      UserError: an array of the state, the chunks or the outputs has another number of axes, or the step uses an
        array from outside that is not of floats.
    """
    own = jax.tree.map(lambda x: Shape(x.shape[1:], x.dtype), chunks)
    step, held, outputs = _without_closure(step, state, own)
    plan = Plan(step, _shapes(held), _shapes(state), own, outputs, len(jax.tree.leaves(chunks)[0]))
    check(plan)
    return _differentiable(plan)(held, state, chunks)


def _without_closure(step: Step, state: Any, tokens: Any) -> tuple[Step, list[Array], Any]:
    """The step as a function of all arrays that it uses, those from outside, and the shapes of its outputs.

    A kernel can only use its arguments; ``jax.closure_convert`` leaves out arrays that are not differentiated.
    """
    with for_kernel():
        program, (after, outputs) = jax.make_jaxpr(step, return_shape=True)(state, tokens)
    results = jax.tree.structure((after, outputs))

    def run(state: Any, tokens: Any, *held: Array) -> tuple[Any, Any]:
        return jax.tree.unflatten(results, jax.core.eval_jaxpr(program.jaxpr, held, *jax.tree.leaves((state, tokens))))

    return run, [jnp.asarray(x) for x in program.consts], outputs


def _differentiable(plan: Plan) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """``(held, state, tokens) -> (state, outputs)``: first derivatives by the kernels, higher ones by ``lax.scan``."""

    def plain(held: Any, state: Any, tokens: Any) -> tuple[Any, Any]:
        return lax.scan(jax.checkpoint(lambda state, chunk: plan.step(state, chunk, *held)), state, tokens)

    def plain_pullback(given: Any, cotangents: Any) -> Any:
        return jax.vjp(plain, *given)[1](cotangents)

    @jax.custom_vjp
    def saving(*given: Any) -> tuple[Any, Any, Any]:
        return _forward(plan, *given, save=True)

    # The saved states are for the pullback alone: nothing is differentiated through them.
    saving.defvjp(lambda *given: (saving(*given), given), lambda given, g: plain_pullback(given, g[:2]))

    @jax.custom_vjp
    def pullback(given: Any, saved: Any, cotangents: Any) -> Any:
        return _backward(plan, given, saved, cotangents)

    def of_pullback(residuals: Any, g: Any) -> Any:
        given, saved, cotangents = residuals
        of_given, of_cotangents = jax.vjp(plain_pullback, given, cotangents)[1](g)
        return of_given, jax.tree.map(jnp.zeros_like, saved), of_cotangents

    pullback.defvjp(lambda *given: (pullback(*given), given), of_pullback)

    @jax.custom_vjp
    def run(*given: Any) -> tuple[Any, Any]:
        return _forward(plan, *given, save=False)[:2]

    def forward(*given: Any) -> tuple[tuple[Any, Any], Any]:
        state, outputs, saved = saving(*given)
        return (state, outputs), (given, saved)

    run.defvjp(forward, lambda residuals, g: pullback(*residuals, g))
    return run


def _forward(plan: Plan, held: Any, state: Any, tokens: Any, *, save: bool) -> tuple[Any, Any, Any]:
    """The final state, the outputs, and the state before every ``save_every``-th chunk (None: not saved)."""
    every, count = plan.save_every, plan.chunks

    def kernel(held, before, tokens, after, outputs, saved, now):
        chunk = pl.program_id(0)
        pl.when(chunk == 0)(lambda: put(now, get(before)))
        if save:
            pl.when(chunk % every == 0)(lambda: put(saved, get(now)))
        read = get_chunk(tokens, plan.tokens, 0)
        end, found = plan.step(get(now), read, *get_narrow(held, plan.held))
        put(now, end)
        put_chunk(outputs, found, 0)
        pl.when(chunk == count - 1)(lambda: put(after, end))

    tokens_in, tokens_out = (chunks_of(count, own, 1, lambda i: i) for own in (plan.tokens, plan.outputs))
    states = one_of(plan.groups, plan.state, lambda i: i // every) if save else None
    ins = whole(wide_shapes(plan.held)), whole(plan.state), tokens_in
    outs, given = (whole(plan.state), tokens_out, states), (wide(held), state, stored(tokens))
    after, outputs, saved = _call(kernel, "memory_forward", count, ins, outs, (plan.state,), given)
    return after, chunked(count, outputs, plan.outputs), saved


def _backward(plan: Plan, given: Any, saved: Any, cotangents: Any) -> Any:
    """Cotangents of what the step holds, of the first state and of the tokens, from the last chunk to the first."""
    every, groups = plan.save_every, plan.groups
    short = plan.chunks % every  # chunks of the last group, where it is not full

    def kernel(held, saved, tokens, of_after, of_outputs, of_held, of_before, of_tokens, of_now, starts):
        group, held = pl.program_id(0), get_narrow(held, plan.held)
        here = jnp.where(group == 0, short, every) if short else every
        pl.when(group == 0)(lambda: put(of_now, get(of_after)))
        pl.when(group == 0)(lambda: put(of_held, jax.tree.map(jnp.zeros_like, wide(held))))

        def again(chunk: Array, _: Any) -> None:
            after, _ = plan.step(get(starts, chunk), get_chunk(tokens, plan.tokens, chunk), *held)
            put(starts, after, chunk + 1)

        def back(i: Array, _: Any) -> None:
            chunk = here - 1 - i
            _, pull = jax.vjp(plan.step, get(starts, chunk), get_chunk(tokens, plan.tokens, chunk), *held)
            of_state, of_chunk, *more = pull((get(of_now), get_chunk(of_outputs, plan.outputs, chunk)))
            put(of_now, of_state)
            put_chunk(of_tokens, of_chunk, chunk)
            put(of_held, jax.tree.map(jnp.add, get(of_held), wide(more)))

        put(starts, get(saved), 0)
        lax.fori_loop(0, here - 1, again, None)
        lax.fori_loop(0, here, back, None)
        pl.when(group == groups - 1)(lambda: put(of_before, get(of_now)))

    def last_first(i: Any) -> Any:
        return groups - 1 - i

    constants, states = whole(wide_shapes(plan.held)), one_of(groups, plan.state, last_first)
    tokens, outputs = (chunks_of(plan.chunks, own, every, last_first) for own in (plan.tokens, plan.outputs))
    starts = jax.tree.map(lambda x: Shape((every, *x.shape), x.dtype), plan.state)
    ins, outs = (constants, states, tokens, whole(plan.state), outputs), (constants, whole(plan.state), tokens)
    arrays = wide(given[0]), saved, stored(given[2]), cotangents[0], stored(cotangents[1])
    of_held, of_state, of_tokens = _call(kernel, "memory_backward", groups, ins, outs, (plan.state, starts), arrays)
    of_held = jax.tree.map(lambda x, own: x.reshape(own.shape), of_held, plan.held)
    return of_held, of_state, chunked(plan.chunks, of_tokens, plan.tokens)


def _call(kernel: Callable[..., None], name: str, steps: int, ins: Any, outs: Any, scratch: Any, given: Any) -> Any:
    """Run the kernel over trees: ``ins`` and ``outs`` are of ``Place``, ``scratch`` of shapes, ``given`` of arrays."""
    refs, (flat_in, flat_out) = jax.tree.structure((*ins, *outs, *scratch), is_leaf=is_place), map(leaves, (ins, outs))

    def run(interpret: bool, *arrays: Array) -> Any:
        return pl.pallas_call(
            lambda *flat: kernel(*jax.tree.unflatten(refs, flat)),
            grid=(steps,),
            in_specs=[place.spec for place in flat_in],
            out_specs=[place.spec for place in flat_out],
            out_shape=[place.shape for place in flat_out],
            scratch_shapes=[pltpu.VMEM(x.shape, x.dtype) for x in jax.tree.leaves(scratch)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT),
            interpret=interpret,
            name=name,
        )(*arrays)

    compiled, interpreted = functools.partial(run, False), functools.partial(run, True)
    found = lax.platform_dependent(*jax.tree.leaves(given), tpu=compiled, default=interpreted)
    return jax.tree.unflatten(jax.tree.structure(outs, is_leaf=is_place), found)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: Shape(x.shape, x.dtype), tree)
