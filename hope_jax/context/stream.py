"""Streams: texts of any length that come in pieces of any size, read and learned.

>>> state = model.init_state(params, batch=1)
>>> loss, state = context.learn(model, params, state, document)          # in pieces of any size
>>> logits, state = model.apply({"params": params}, question, state)     # reads with what was learned, writes nothing

The weights of a level move once per period, and the gradient of a chunk goes through all of it: the tokens of an
unfinished chunk are kept, and read again from its start when more have come. So any cut of a stream into calls gives
the same result. Read ``state.py`` next.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from hope_jax.context.piece import piece_size, read_piece, request_for
from hope_jax.context.state import State, batch_of, checked, fresh_mixer, reset, with_deltas
from hope_jax.context.writes import Nats
from hope_jax.errors import UserError
from hope_jax.nn.feed_forward.fast import ContextState
from hope_jax.nn.language_model import check_tokens
from hope_jax.nn.mixers.attention import room_left
from hope_jax.types import Array, Bool, Float, Scalar


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
    """``surprise``, by the same program, where nothing is stored: the levels stay as they are."""
    nats, _, after = _read(model, params, state, tokens, learning=False)
    return nats, after


def _read(
    model: Any, params: Any, state: State, tokens: Any, learning: bool = True
) -> tuple[Nats, Float[Array, "B vocab"], ContextState]:
    tokens = jnp.asarray(tokens)
    check_tokens(tokens, model.config.vocab_size)
    now = checked(model, params, state, tokens.shape[0])
    _refuse_traced(now, tokens)
    check_room(now, tokens.shape[1])
    size, nats, logits = piece_size(model), [], jnp.zeros(())
    for at in range(0, tokens.shape[1], size):
        part = tokens[:, at : at + size]
        predicted = part.shape[1] - int(now.interrupted or now.unfinished == 0)
        padded = jnp.pad(part.astype(jnp.int32), ((0, 0), (0, size - part.shape[1])))
        piece, now = read_piece(model, params, now, padded, request_for(part.shape[1], learn=learning))
        _require_finite(piece.finite)
        nats.append(piece.nats[:, :predicted])
        logits = piece.logits
    return jnp.concatenate(nats, axis=1), logits, now


def finish(model: Any, params: Any, state: State) -> ContextState:
    """End the stream here: every level stores what it has gathered, be its period over or not.

    A token counts as much as in a full period; nested levels are not set back, and a level with nothing new is not
    written. What follows is read with all that, and starts periods of its own.
    """
    return _ended(model, params, checked(model, params, state, batch_of(state)), finish=True)


def clear(model: Any, params: Any, state: State, capacity: int | None = None) -> ContextState:
    """Forget the context and keep what is stored: fresh mixers, levels as they are.

    For the next document of a stream, or to see what of the last one is in the levels. The unfinished chunk ends here,
    as at an interruption: its tokens count in the periods that go on. ``capacity`` is as in ``model.init_state``.
    """
    now = checked(model, params, state, batch_of(state))
    if now.unfinished > 1:  # there is something to be learned
        now = _ended(model, params, now)
    mixer = fresh_mixer(model, params, batch_of(now), capacity)
    nothing = {"tokens": jnp.zeros_like(now.tokens), "unfinished": jnp.zeros((), jnp.int32)}
    return now._replace(mixer=mixer, anchor=mixer, interrupted=jnp.zeros((), bool), **nothing)


def merge(model: Any, params: Any, state: State) -> tuple[Any, ContextState]:
    """Make what was learned the model's own: parameters with Delta in them, and the state without it.

    The stream is brought to an end first (``finish``); the new parameters read as the old ones did then, up to
    rounding. Of several streams the mean is taken.

    Raises:
      UserError: a state of another model.
    """
    state = finish(model, params, state)
    return with_deltas(model, params, state.levels), reset(model, state)


def _ended(model: Any, params: Any, state: ContextState, finish: bool = False) -> ContextState:
    """The state after its unfinished chunk."""
    _refuse_traced(state)
    nothing = jnp.zeros((batch_of(state), piece_size(model)), jnp.int32)
    piece, state = read_piece(model, params, state, nothing, request_for(0, end=True, finish=finish))
    _require_finite(piece.finite)
    return state


def _refuse_traced(*trees: Any) -> None:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees)):
        raise UserError(
            "context reads with a compiled program of its own: call it outside jax.jit, jax.grad and jax.vmap"
        )


def _require_finite(finite: Bool[Array, ""]) -> None:
    if not finite:
        raise UserError(
            "this made losses or weights that are not finite, so nothing was learned: the parameters or the state are "
            "damaged, or the rate of a level is too high"
        )


def check_room(state: ContextState, count: int) -> None:
    """Raise UserError where an attention cache is too small for so many tokens."""
    room = room_left(state.mixer)
    if room is not None and count > room:
        raise UserError(
            f"{count} tokens do not fit: the attention cache has room for {room} more; make the state with "
            "a larger capacity (context.start), or use a model without full attention"
        )
