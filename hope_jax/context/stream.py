"""Streams: texts of any length that come in pieces of any size, read and learned.

>>> state = model.init_state(params, batch=1)
>>> loss, state = context.learn(model, params, state, document)          # in pieces of any size
>>> logits, state = model.apply({"params": params}, question, state)     # reads with what was learned, writes nothing

The weights of a level move once per period, and the gradient of a chunk goes through all of it: the tokens of an
unfinished chunk are kept, and read again from its start when more have come. So any cut of a stream into calls gives
the same result. Read ``files.py`` next.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from hope_jax.context.piece import piece_size, read_piece
from hope_jax.context.schedule import schedule_of
from hope_jax.context.writes import Nats, fresh_levels
from hope_jax.errors import UserError
from hope_jax.nn.feed_forward.fast import BlockState, ContextState, as_matrix
from hope_jax.nn.language_model import check_tokens
from hope_jax.nn.room import room_left, slots_of
from hope_jax.storage.digests import first_difference, kinds
from hope_jax.storage.programs import run_stored
from hope_jax.types import Array, Float, Int, Scalar, Tokens

State = BlockState | ContextState


@functools.partial(jax.jit, static_argnames=("model", "batch", "capacity"))
def start(model: Any, params: Any, batch: int, capacity: int | None = None) -> ContextState:
    """The state of ``batch`` fresh streams in which every level of the model can be written, whatever its period.

    Args:
      model, params: a model whose feed-forward part has levels.
      batch, capacity: as in ``model.init_state``; a model whose caches grow can read ``capacity`` tokens in all.

    Raises:
      UserError: the model has no levels, their periods are not multiples of one another, or ``batch`` is below 1.
    """
    schedule_of(model, trained=False)
    return _around(model, model.init_state(params, batch, capacity).mixer, batch)


def learn(model: Any, params: Any, state: State, tokens: Any) -> tuple[Scalar, ContextState]:
    """Read ``tokens`` and store them: every level whose period ends is rewritten.

    Args:
      state: of ``model.init_state``, ``start``, ``load`` or an earlier call. What ``model.apply`` or ``generate`` read
        in between is context, but is not stored, and ends the chunk before it.
      tokens: ids [B, T], any T of 1 or more.

    Returns:
      Mean loss of these tokens in nats, each predicted from all before it at the weights it was read with (0 where
      nothing was predicted, see ``surprise``), and the state, which ``model.apply`` takes too.

    Raises:
      UserError: tokens the model cannot read, a state of another model or batch size, a call inside ``jax.jit`` (it is
        compiled itself), or losses or weights that are not finite. The state that was given is as good as before.
    """
    nats, state = surprise(model, params, state, tokens)
    return jnp.sum(nats) / max(1, nats.size), state


def surprise(model: Any, params: Any, state: State, tokens: Any) -> tuple[Nats, ContextState]:
    """``learn``, with the loss of every token in nats, [B, T]; [B, T-1] where nothing that was learned is before them.

    The first token of a stream, and the first after an interruption, ``finish`` or ``clear``, is not predicted.
    """
    nats, _, after = _read(model, params, state, tokens)
    return nats, after


def expect(model: Any, params: Any, state: State, tokens: Any) -> tuple[Float[Array, "B vocab"], ContextState]:
    """``learn``, with the logits of the token to come in the place of the loss."""
    _, logits, after = _read(model, params, state, tokens)
    return logits, after


def read_without_learning(model: Any, params: Any, state: State, tokens: Any) -> tuple[Nats, ContextState]:
    """``surprise``, by the same program, where nothing is stored: the levels and their periods stay as they are.

    The call that completes a chunk decides whether it is learned: ``learn`` or ``finish`` stores the unfinished one.
    """
    nats, _, after = _read(model, params, state, tokens, learning=False)
    return nats, after


def _read(
    model: Any, params: Any, state: State, tokens: Any, learning: bool = True
) -> tuple[Nats, Float[Array, "B vocab"], ContextState]:
    tokens = tokens if isinstance(tokens, Tracer) else np.asarray(tokens)
    check_tokens(tokens, model.config.vocab_size)
    now = _checked(model, params, state, tokens)
    check_room(now, tokens.shape[1])
    size, nats, logits = piece_size(model), [], jnp.zeros(())
    for at in range(0, tokens.shape[1], size):
        part = tokens[:, at : at + size]
        predicted = part.shape[1] - int(now.interrupted or int(now.unfinished) == 0)
        found, logits, now = _read_piece(model, params, now, part, learning)
        nats.append(np.asarray(found)[:, :predicted])
    return jnp.asarray(np.concatenate(nats, axis=1)), logits, now


def _read_piece(
    model: Any,
    params: Any,
    state: ContextState,
    tokens: Int[np.ndarray, "B piece"],
    learn: bool,
    end: bool = False,
    finish: bool = False,
) -> tuple[Nats, Float[Array, "B vocab"], ContextState]:
    """One call of the program, with up to ``piece_size`` tokens. Raises UserError where numbers are not finite.

    Around the program arithmetic is numpy's: JAX would compile a small program for every operation and length.
    """
    count = tokens.shape[1]
    padded = np.pad(tokens.astype(np.int32), ((0, 0), (0, piece_size(model) - count)))
    request = params, state, padded, count, learn, end, finish
    nats, logits, finite, state = run_stored(read_piece, model, request, like=(0, 0, 0, state))
    if not finite:
        raise UserError(
            "this made losses or weights that are not finite, so nothing was learned: the parameters or the state are "
            "damaged, or the rate of a level is too high"
        )
    return nats, logits, state


def finish(model: Any, params: Any, state: State) -> ContextState:
    """End the stream here: every level stores what it has gathered, be its period over or not.

    A token counts as much as in a full period; nested levels are not set back, and a level with nothing new is not
    written. What follows is read with all that, and starts periods of its own.
    """
    nothing = np.zeros((batch_of(state), 0), np.int32)
    now = _checked(model, params, state, nothing)
    return _read_piece(model, params, now, nothing, learn=True, end=True, finish=True)[2]


def clear(model: Any, params: Any, state: State, capacity: int | None = None) -> ContextState:
    """Forget the context and keep what is stored: fresh mixers, levels as they are.

    For the next document of a stream, or to see what of the last one is in the levels. The unfinished chunk ends here,
    as at an interruption: its tokens count in the periods that go on. ``capacity`` is as in ``model.init_state``.
    """
    nothing = np.zeros((batch_of(state), 0), np.int32)
    now = _checked(model, params, state, nothing)
    if now.unfinished > 1:  # there is something to be learned
        _, _, now = _read_piece(model, params, now, nothing, learn=True, end=True)
    return start(model, params, len(nothing), capacity)._replace(levels=now.levels, position=now.position)


def merge(model: Any, params: Any, state: State) -> tuple[Any, ContextState]:
    """Make what was learned the model's own: parameters with Delta in them, and the state without it.

    The stream is brought to an end first (``finish``); the new parameters read as the old ones did then, up to
    rounding. Of several streams the mean is taken.
    """
    state = finish(model, params, state)
    part = jax.tree.map(lambda leaf: leaf, params["blocks"]["feed_forward"])  # its containers are copies
    for place, level in zip(model.config.feed_forward.kernels(part), state.levels, strict=True):
        for name, delta in level.delta.items():
            kernel: Array = place[name]["kernel"]
            moved = jnp.mean(as_matrix(delta, place.get(f"{name}_basis")), axis=1)
            place[name] = {**place[name], "kernel": kernel + moved.astype(kernel.dtype)}
    return params | {"blocks": params["blocks"] | {"feed_forward": part}}, reset(model, state)


def reset(model: Any, state: State, level: int | None = None) -> ContextState:
    """Forget what a level has stored and gathered, or all levels (None); what the mixers have read stays.

    Of one level, the tokens of the unfinished chunk are learned still when it is over; of all, they are forgotten too.

    Raises:
      UserError: there is no such level, or the state is of another model.
    """
    now = entered(model, state)
    fresh = _around(model, now.mixer, batch_of(state))
    check_kinds(now.levels, fresh.levels)
    if level is None:
        return fresh
    if not 0 <= level < len(fresh.levels):
        raise UserError(f"level is {level}; the model's levels are 0 to {len(fresh.levels) - 1}, fastest first")
    return now._replace(levels=(*now.levels[:level], fresh.levels[level], *now.levels[level + 1 :]))


def batch_of(state: State) -> int:
    """How many streams there are. Raises UserError for what is no state."""
    if isinstance(state, ContextState):
        return state.tokens.shape[0]
    if isinstance(state, BlockState):
        return jax.tree.leaves(state)[0].shape[1]
    raise UserError(f"the state is a {type(state).__name__}; expected one of model.init_state or context.learn")


def entered(model: Any, state: State) -> ContextState:
    """The state with a place for what will be learned: what was read before is context."""
    batch = batch_of(state)
    return state if isinstance(state, ContextState) else _around(model, state.mixer, batch)


def _around(model: Any, mixer: Any, batch: int) -> ContextState:
    """The state of mixers whose levels have learned nothing."""
    schedule = schedule_of(model, trained=False)
    tokens, zero = jnp.zeros((batch, schedule.chunk), jnp.int32), jnp.zeros((), jnp.int32)
    levels = fresh_levels(model, schedule, batch)
    return ContextState(mixer, mixer, levels, tokens, zero, jnp.zeros((), bool), zero)


def _checked(model: Any, params: Any, state: State, tokens: Tokens | np.ndarray) -> ContextState:
    """The state, if it is one of this model and of as many streams as ``tokens``. Raises UserError otherwise."""
    batch_of(state)
    expected = start.eval_shape(model, params, tokens.shape[0], slots_of(state))  # traced once for each kind
    check_kinds(state, expected.blocks._replace(feed_forward=()) if isinstance(state, BlockState) else expected)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((state, tokens))):
        raise UserError(
            "context reads with a compiled program of its own: call it outside jax.jit, jax.grad and jax.vmap"
        )
    return entered(model, state)


def check_kinds(state: Any, expected: Any) -> None:
    """Raise UserError unless all arrays have the expected dtypes and shapes."""
    if different := first_difference(kinds(state), kinds(expected)):
        name, there, here = different
        raise UserError(f"the state is of another model, batch size or dtype: {name} is {there}; expected {here}")


def check_room(state: ContextState, count: int) -> None:
    """Raise UserError where a cache is too small for so many tokens."""
    room = room_left(state.mixer)
    if room is not None and count > room:
        raise UserError(
            f"{count} tokens do not fit: the cache has room for {room} more; make the state with "
            "a larger capacity (context.start), or use a model whose state does not grow"
        )
