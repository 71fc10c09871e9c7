"""One compiled program reads a piece of a stream, whatever its length, and stores what it says (SPEC 3.1).

``read_piece`` lays the unfinished chunk and up to ``piece_size`` new tokens out on chunks, one slot for each, and fills
up with padding, which is never read: a model and a batch size have one program. It scans the slots. A full slot is read
with gradients and learned; the last one, whose next token is not there yet, is only read. The gradient is taken behind
a condition, so that the model is traced once. Read ``stream.py`` next.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hope_jax.context.schedule import Schedule, schedule_of
from hope_jax.context.writes import Chunk, Levels, Nats, gather, rates_of, set_back, write
from hope_jax.nn.feed_forward.fast import ContextState
from hope_jax.nn.layers import param_dtype
from hope_jax.types import Array, Bool, Float, Int, Tokens

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


def request_for(count: int, learn: bool = True, end: bool = False, finish: bool = False) -> Request:
    """The request for ``count`` tokens."""
    return Request(jnp.asarray(count, jnp.int32), *map(jnp.asarray, (learn, end, finish)))


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
    count, labelled = (
        jnp.maximum(jnp.where(ends, unfinished - 1, jnp.clip(total - last - start, 0, chunk)), 0) for last in (0, 1)
    )
    return _Slot(inputs, labels, count, labelled, ends, ~ends & (total > start + chunk))


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
