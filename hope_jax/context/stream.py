"""Streams: texts of any length that come in pieces of any size, read and learned by one compiled program.

>>> state = model.init_state(params, batch=1)
>>> loss, state = context.learn(model, params, state, document)          # in pieces of any size
>>> logits, state = model.apply({"params": params}, question, state)     # reads with what was learned, writes nothing

The weights of a level move once per period, and the gradient of a chunk goes through all of it: the tokens of an
unfinished chunk are kept, and read again from its start when more have come. So any cut of a stream into calls gives
the same result. ``read_piece`` lays the unfinished chunk and up to ``piece_size`` new tokens out on chunks, and fills
up with padding that is never read: whatever the lengths, a model and batch size have one program.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from hope_jax.context.state import State, batch_of, checked, fresh_mixer, reset, with_deltas
from hope_jax.context.writes import Chunk, Levels, Nats, Schedule, gather, rates_of, schedule_of, set_back, write
from hope_jax.errors import UserError
from hope_jax.nn.feed_forward.fast import ContextState
from hope_jax.nn.language_model import check_tokens
from hope_jax.nn.layers import param_dtype
from hope_jax.nn.mixers.attention import room_left
from hope_jax.types import Array, Bool, Float, Int, Scalar, Tokens

PIECE = 512
"""Tokens that one call of the program reads at most; whole chunks, and one at least."""


class Request(NamedTuple):
    """What is asked of ``read_piece``.

    Attributes:
      count: tokens that are real, from the first; int32.
      learn: whether they are learned; without it no level gathers or is written.
      end: whether the unfinished chunk ends before these tokens, as after an interruption.
      finish: whether all levels then store what they have gathered, be their period over or not.
    """

    count: Int[Array, ""]
    learn: Bool[Array, ""]
    end: Bool[Array, ""]
    finish: Bool[Array, ""]


class Piece(NamedTuple):
    """What reading a piece gives: nats of its tokens, logits after the last one, whether all numbers are finite."""

    nats: Nats
    logits: Float[Array, "B vocab"]
    finite: Bool[Array, ""]


class _Slot(NamedTuple):
    """One chunk of a piece. ``ends``: it ends before it is full; ``whole``: it is full, and its last label is known."""

    inputs: Tokens
    labels: Tokens
    count: Int[Array, ""]
    labelled: Int[Array, ""]
    ends: Bool[Array, ""]
    whole: Bool[Array, ""]


class _Reader(NamedTuple):
    """What changes from chunk to chunk: the stream, and the logits after the last token that was read."""

    state: ContextState
    logits: Float[Array, "B vocab"]


def piece_size(model: Any) -> int:
    """Tokens that one call of ``read_piece`` takes."""
    chunk = schedule_of(model, trained=False).chunk
    return -(-PIECE // chunk) * chunk


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
    state = checked(model, params, state, tokens.shape[0])
    _refuse_traced(state, tokens)
    check_room(state, tokens.shape[1])
    size, found, logits = piece_size(model), [], None
    for at in range(0, tokens.shape[1], size):
        part = tokens[:, at : at + size]
        predicted = part.shape[1] - int(state.interrupted or state.unfinished == 0)
        padded = jnp.pad(part.astype(jnp.int32), ((0, 0), (0, size - part.shape[1])))
        piece, state = read_piece(model, params, state, padded, _request(part.shape[1], learn=learning))
        _require_finite(piece.finite)
        found.append(piece.nats[:, :predicted])
        logits = piece.logits
    return jnp.concatenate(found, axis=1), logits, state


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
    state = checked(model, params, state, batch_of(state))
    if state.unfinished > 1:  # there is something to be learned
        state = _ended(model, params, state)
    mixer = fresh_mixer(model, params, batch_of(state), capacity)
    nothing = {"tokens": jnp.zeros_like(state.tokens), "unfinished": jnp.zeros((), jnp.int32)}
    return state._replace(mixer=mixer, anchor=mixer, interrupted=jnp.zeros((), bool), **nothing)


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
    piece, state = read_piece(model, params, state, nothing, _request(0, end=True, finish=finish))
    _require_finite(piece.finite)
    return state


def _request(count: int, learn: bool = True, end: bool = False, finish: bool = False) -> Request:
    return Request(jnp.asarray(count, jnp.int32), *map(jnp.asarray, (learn, end, finish)))


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


@functools.partial(jax.jit, static_argnames="model")
def read_piece(
    model: Any, params: Any, state: ContextState, tokens: Tokens, request: Request
) -> tuple[Piece, ContextState]:
    """Read up to ``piece_size`` tokens, whole chunks first; nothing is checked here.

    Args:
      tokens: [B, piece_size], padding zeros after the first ``request.count``.

    Returns:
      The piece, whose first nats are those of the tokens that were predicted, and the state.
    """
    schedule = schedule_of(model, trained=False)
    request = request._replace(end=request.end | request.finish | state.interrupted)
    offset = jnp.where(request.end, schedule.chunk, state.unfinished)
    every, total = _joined(state.tokens, tokens, offset), offset + request.count
    step = functools.partial(_read_slot, model, params, schedule, rates_of(model, params, schedule), request)

    def read_or_skip(reader: _Reader, slot: _Slot) -> tuple[_Reader, Array]:
        return lax.cond(slot.ends | (slot.count > 0), step, lambda reader, _: (reader, no_nats), reader, slot)

    wide = param_dtype(model.config.dtype)
    no_logits, no_nats = jnp.zeros((len(tokens), model.config.vocab_size), wide), jnp.zeros(state.tokens.shape, wide)
    slots = _slots(schedule.chunk, every, total, state.unfinished, request.end)
    (after, logits), nats = lax.scan(read_or_skip, _Reader(state, no_logits), slots)
    nats = jnp.swapaxes(nats, 0, 1).reshape(len(tokens), -1)
    predicted = offset - jnp.where(request.end | (state.unfinished == 0), 0, 1)
    nats = lax.dynamic_slice_in_dim(nats, predicted, tokens.shape[1], axis=1)
    finite = _is_finite(nats, logits, after.levels)
    return Piece(nats, logits, finite), _with_rest(after, every, total, request.count)


def _joined(unfinished: Int[Array, "B C"], tokens: Tokens, offset: Int[Array, ""]) -> Int[Array, "B places"]:
    """The unfinished chunk, then the new tokens from ``offset`` on, and one place more for the last label."""
    room = jnp.zeros((len(tokens), unfinished.shape[1] + tokens.shape[1] + 1), jnp.int32)
    room = lax.dynamic_update_slice_in_dim(room, unfinished, 0, axis=1)
    return lax.dynamic_update_slice_in_dim(room, tokens, offset, axis=1)


def _slots(chunk: int, every: Tokens, total: Array, unfinished: Array, end: Array) -> _Slot:
    """The chunks of a piece, stacked; ``total``: tokens from the start of the first one to the last real one."""
    inputs, labels = (jnp.swapaxes(x.reshape(len(x), -1, chunk), 0, 1) for x in (every[:, :-1], every[:, 1:]))
    start = chunk * jnp.arange(len(inputs), dtype=jnp.int32)
    ends = end & (start == 0)  # the label of its last token is not known
    counts = [jnp.where(ends, unfinished - 1, jnp.clip(total - known - start, 0, chunk)) for known in (0, 1)]
    return _Slot(inputs, labels, *(jnp.maximum(count, 0) for count in counts), ends, ~ends & (total > start + chunk))


def _read_slot(
    model: Any, params: Any, schedule: Schedule, rates: Any, request: Request, reader: _Reader, slot: _Slot
) -> tuple[_Reader, Nats]:
    """Read one chunk from its start; learn it if it is complete, or ends here."""
    state = reader.state
    complete = slot.whole | (slot.ends & (slot.labelled > 0))
    stored = complete & request.learn
    chunk = Chunk(slot.inputs, slot.labels, slot.count, slot.labelled, stored)
    levels, read = gather(model, params, schedule, state.anchor, state.levels, chunk)
    levels = _stored(schedule, rates, levels, state.position, stored, slot.ends & request.finish)
    mixer = _select(slot.ends, state.mixer, read.mixer)
    position = (state.position + schedule.chunk * complete) % schedule.distinct[-1]
    state = state._replace(
        mixer=mixer,
        anchor=_select(slot.ends | slot.whole, mixer, state.anchor),
        levels=levels,
        position=jnp.where(slot.ends & request.finish, 0, position),
    )
    return _Reader(state, jnp.where(slot.ends, reader.logits, read.logits)), read.nats


def _stored(
    schedule: Schedule, rates: Any, levels: Levels, position: Array, stored: Bool[Array, ""], finish: Bool[Array, ""]
) -> Levels:
    """The levels after a chunk that began at ``position``: written where a period ends.

    ``finish``: written wherever something is gathered, and nothing is set back, as no slower period has ended.
    """
    end = position + schedule.chunk
    due = [now & stored for now in schedule.due(end)]
    waiting = [schedule.written(i) & (stored | ~now) for i, now in enumerate(schedule.due(position))]
    written = [jnp.where(finish, *pair) for pair in zip(waiting, due, strict=True)]
    return set_back(schedule, write(schedule, rates, levels, end, written), [now & ~finish for now in due])


def _select(first: Bool[Array, ""], one: Any, other: Any) -> Any:
    return jax.tree.map(functools.partial(jnp.where, first), one, other)


def _is_finite(*trees: Any) -> Bool[Array, ""]:
    return jnp.isfinite(sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(trees)))


def _with_rest(state: ContextState, every: Tokens, total: Array, count: Array) -> ContextState:
    """The state with the tokens that are not learned yet: 1 to C, or none where no token is new."""
    chunk = state.tokens.shape[1]
    taken = (total - 1) // chunk * chunk
    unfinished = jnp.where(count > 0, total - taken, 0)
    rest = lax.dynamic_slice_in_dim(every, taken, chunk, axis=1)
    rest = jnp.where(jnp.arange(chunk)[None] < unfinished, rest, 0)
    return state._replace(tokens=rest, unfinished=unfinished, interrupted=jnp.zeros((), bool))
