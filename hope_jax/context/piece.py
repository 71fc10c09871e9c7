"""One compiled program reads a piece of a stream, whatever its length, and stores what it says (SPEC 3.1).

``read_piece`` lays the unfinished chunk and up to ``piece_size`` new tokens out on chunks, one slot for each, and fills
up with padding, which is never read: a model and a batch size have one program. It scans the slots. A full slot is read
with gradients and learned; the last one, whose next token is not there yet, is only read. The gradient is taken behind
a condition, so that the model is traced once. Read ``stream.py`` next.
"""

import functools
from typing import Any

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

Slot = tuple[Chunk, Bool[Array, "*slots"], Bool[Array, "*slots"]]
"""One chunk of a piece; whether it ends before it is full; whether it is over and has a label to be learned."""


def piece_size(model: Any) -> int:
    """Tokens that one call of ``read_piece`` takes."""
    chunk = schedule_of(model, trained=False).chunk
    return -(-PIECE // chunk) * chunk


@functools.partial(jax.jit, static_argnames="model")
def read_piece(
    model: Any,
    params: Any,
    state: ContextState,
    tokens: Tokens,
    count: Int[Array, ""],
    learn: Bool[Array, ""],
    end: Bool[Array, ""],
    finish: Bool[Array, ""],
) -> tuple[Nats, Float[Array, "B vocab"], Bool[Array, ""], ContextState]:
    """Read up to ``piece_size`` tokens, whole chunks first; nothing is checked here.

    Args:
      tokens: [B, piece_size], of which the first ``count`` are real and the others zeros.
      learn: whether they are learned; without it no level gathers or is written, and no period goes on.
      end: whether the unfinished chunk ends before these tokens, as after an interruption.
      finish: whether all levels then store what they have gathered, be their period over or not.

    Returns:
      Nats, of which the first are those of the tokens that were predicted; logits after the last token; whether all
      numbers are finite; the state.
    """
    schedule = schedule_of(model, trained=False)
    end = end | finish | state.interrupted
    offset = jnp.where(end, schedule.chunk, state.unfinished)
    every, total = _joined(state.tokens, tokens, offset), offset + count
    step = functools.partial(_read_slot, model, params, schedule, rates_of(model, params, schedule), finish)
    wide = param_dtype(model.config.dtype)
    no_logits, no_nats = jnp.zeros((len(tokens), model.config.vocab_size), wide), jnp.zeros(state.tokens.shape, wide)

    def read_or_skip(carry: Any, slot: Slot) -> tuple[Any, Nats]:
        return lax.cond(slot[1] | (slot[0].count != 0), step, lambda same, _: (same, no_nats), carry, slot)

    slots = _slots(schedule.chunk, every, total, state.unfinished, end, learn)
    (after, logits), nats = lax.scan(read_or_skip, (state, no_logits), slots)
    nats = jnp.swapaxes(nats, 0, 1).reshape(len(tokens), -1)
    predicted = offset - jnp.where(end | (state.unfinished == 0), 0, 1)
    nats = lax.dynamic_slice_in_dim(nats, predicted, tokens.shape[1], axis=1)
    numbers = jax.tree.leaves((nats, logits, after.levels))
    finite = jnp.isfinite(sum(jnp.sum(jnp.abs(leaf)) for leaf in numbers))
    return nats, logits, finite, _with_rest(after, every, total, count)


def _joined(unfinished: Int[Array, "B C"], tokens: Tokens, offset: Int[Array, ""]) -> Int[Array, "B places"]:
    """The unfinished chunk, then the new tokens from ``offset`` on, and one place more for the last label."""
    room = jnp.zeros((len(tokens), unfinished.shape[1] + tokens.shape[1] + 1), jnp.int32)
    room = lax.dynamic_update_slice_in_dim(room, unfinished, 0, axis=1)
    return lax.dynamic_update_slice_in_dim(room, tokens, offset, axis=1)


def _slots(chunk: int, every: Tokens, total: Array, unfinished: Array, end: Array, learn: Array) -> Slot:
    """The slots of a piece, stacked; ``total``: tokens from the start of the first one to the last real one."""
    inputs, labels = (jnp.swapaxes(x.reshape(len(x), -1, chunk), 0, 1) for x in (every[:, :-1], every[:, 1:]))
    start = chunk * jnp.arange(len(inputs), dtype=jnp.int32)
    ends = end & (start == 0)  # the label of its last token is not known
    count, labelled = (
        jnp.maximum(jnp.where(ends, unfinished - 1, jnp.clip(total - last - start, 0, chunk)), 0) for last in (0, 1)
    )
    complete = jnp.where(ends, labelled > 0, total > start + chunk)
    return Chunk(inputs, labels, count, labelled, complete & learn), ends, complete


def _read_slot(
    model: Any, params: Any, schedule: Schedule, rates: Any, finish: Bool[Array, ""], carry: Any, slot: Slot
) -> tuple[tuple[ContextState, Float[Array, "B vocab"]], Nats]:
    """Read one chunk from its start, and store what is to be stored; ``carry``: the state, the logits before."""
    (state, logits), (chunk, ends, complete) = carry, slot
    levels, read = gather(model, params, schedule, state.anchor, state.levels, chunk)
    mixer = _select(ends, state.mixer, read.mixer)
    position = (state.position + schedule.chunk * jnp.asarray(chunk.stored)) % schedule.distinct[-1]
    state = state._replace(
        mixer=mixer,
        anchor=_select(ends | complete, mixer, state.anchor),
        levels=_stored(schedule, rates, levels, state.position, chunk.stored, ends & finish),
        position=jnp.where(ends & finish, 0, position),
    )
    return (state, jnp.where(ends, logits, read.logits)), read.nats


def _stored(
    schedule: Schedule, rates: Any, levels: Levels, position: Array, stored: Any, finish: Bool[Array, ""]
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


def _with_rest(state: ContextState, every: Tokens, total: Array, count: Array) -> ContextState:
    """The state with the tokens that are not learned yet: 1 to C, or none where no token is new."""
    chunk = state.tokens.shape[1]
    taken = (total - 1) // chunk * chunk
    unfinished = jnp.where(count > 0, total - taken, 0)
    rest = lax.dynamic_slice_in_dim(every, taken, chunk, axis=1)
    rest = jnp.where(jnp.arange(chunk)[None] < unfinished, rest, 0)
    return state._replace(tokens=rest, unfinished=unfinished, interrupted=jnp.zeros((), bool))
