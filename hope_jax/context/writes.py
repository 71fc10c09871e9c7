"""Reading with writes: the levels of a continuum memory system learn from the text while it is read (Eq. 71; SPEC 3.1).

The text is cut into chunks of C tokens, C the period of the fastest level. Per chunk, for all levels at once::

    loss  = mean over the chunk's tokens of the next-token loss, at the weights before this chunk's write
    gathered_l += d loss / d Delta_l                                  the state carried in is a constant here
    every C_l tokens:  Delta_l -= eta_l optimizer(clip(gathered_l C / C_l));  gathered_l = 0

The label of a chunk's last token is the first of the next chunk, which is read with the new weights: causal. Training
(``reading_loss``) differentiates through all of it, except where ``bptt`` cuts. Read ``piece.py`` next: the same for
a text that comes in pieces.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from hope_jax.context.schedule import Schedule, schedule_of
from hope_jax.errors import UserError
from hope_jax.levels import scan_periods
from hope_jax.nn.feed_forward.fast import BlockState, LevelState
from hope_jax.types import Array, Bool, Count, Float, Tokens

Nats = Float[Array, "B predicted"]
Levels = tuple[LevelState, ...]


def fresh_levels(model: Any, schedule: Schedule, batch: int) -> Levels:
    """The levels of ``batch`` sequences before the first write."""
    config = model.config
    trees = config.feed_forward.blank(batch, config.width, config.dtype)[: len(schedule.periods)]
    stacked = jax.tree.map(lambda leaf: jnp.zeros((config.layers, *leaf.shape), leaf.dtype), trees)
    return tuple(_fresh(schedule, tree) for tree in stacked)


def _fresh(schedule: Schedule, like: Any) -> LevelState:
    """A level that was never written, Delta shaped as ``like``."""
    zero = jax.tree.map(jnp.zeros_like, like)
    return LevelState(zero, zero, jax.vmap(jax.vmap(schedule.writes.optimizer.build().init))(zero))


class Chunk(NamedTuple):
    """Up to C tokens and the token after each.

    Attributes:
      inputs, labels: [B, C].
      count: tokens that are real, and labelled: labels that are known; None: all.
      stored: whether the gradient is wanted; None: yes, and training may differentiate it.
    """

    inputs: Tokens
    labels: Tokens
    count: Count = None
    labelled: Count = None
    stored: Bool[Array, ""] | None = None


class Read(NamedTuple):
    """What reading a chunk gives: the mixers' states after it, its nats, logits after its last token."""

    mixer: Any
    nats: Nats
    logits: Float[Array, "B vocab"]


def gather(
    model: Any, params: Any, schedule: Schedule, mixer: Any, levels: Levels, chunk: Chunk
) -> tuple[Levels, Read]:
    """Read a chunk and add the gradient of its loss to what is gathered; nothing is written."""

    def loss(deltas: tuple[Any, ...]) -> tuple[Array, Read]:
        unwritten = len(model.config.feed_forward.periods(model.config.layers)) - len(deltas)
        state = BlockState(mixer, deltas + (None,) * unwritten)
        logits, after = model.apply({"params": params}, chunk.inputs, state, chunk.count)
        nats = cross_entropy(logits, chunk.labels)
        if chunk.labelled is not None:
            nats = jnp.where(jnp.arange(nats.shape[1])[None] < chunk.labelled, nats, 0)
        last = -1 if chunk.count is None else jnp.maximum(chunk.count - 1, 0)
        return jnp.sum(nats) / schedule.chunk, Read(after.mixer, nats, logits[:, last])

    def added(index: int, level: LevelState, slope: Any) -> LevelState:
        slope = lax.stop_gradient(slope) if schedule.bptt(index) == 0 else slope
        return level._replace(gathered=jax.tree.map(jnp.add, level.gathered, slope))

    deltas = tuple(level.delta for level in levels)
    value, pullback, read = jax.vjp(loss, deltas, has_aux=True)
    one = jnp.ones_like(value)
    if chunk.stored is None:
        (slopes,) = pullback(one)
    else:  # not computed where it is not wanted
        slopes = lax.cond(chunk.stored, lambda: pullback(one)[0], lambda: jax.tree.map(jnp.zeros_like, deltas))
    return tuple(map(added, range(len(levels)), levels, slopes)), read


def cross_entropy(logits: Float[Array, "B T vocab"], labels: Tokens) -> Nats:
    """Nats per label, in at least float32."""
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(wide, labels)


def write(schedule: Schedule, rates: Sequence[Array], levels: Levels, at: Any, due: Sequence[Array]) -> Levels:
    """The levels after token ``at``, written in those layers that are ``due`` (see ``Schedule.due``)."""
    rows = enumerate(zip(levels, rates, due, strict=True))
    return tuple(_where(now, partial(_written, schedule, i, rate, at, now), level) for i, (level, rate, now) in rows)


def set_back(schedule: Schedule, levels: Levels, due: Sequence[Array]) -> Levels:
    """Nested levels: where the next slower level was ``due``, a level starts anew."""
    if not schedule.nested:
        return levels
    pairs = zip(levels[:-1], due[1:], strict=True)
    return *(_where(now, lambda level: _fresh(schedule, level.delta), level) for level, now in pairs), levels[-1]


def _where(layers: Array, change: Callable[[LevelState], LevelState], level: LevelState) -> LevelState:
    """``level``, changed in those layers; leaves [L, ...]."""
    if layers.ndim == 0:
        return lax.cond(layers, change, lambda same: same, level)
    return _select(layers, change(level), level)


def _select(layers: Bool[Array, " L"], new: Any, old: Any) -> Any:
    """``new`` in those layers, ``old`` in the others."""
    return jax.tree.map(lambda a, b: jnp.where(_along(layers, b), a, b), new, old)


def _along(layers: Array, leaf: Array) -> Array:
    """[L] -> [L, 1, ...], to go with a leaf [L, ...]."""
    return layers.reshape(-1, *[1] * (leaf.ndim - 1))


def _scaled(scale: Float[Array, " L"], tree: Any) -> Any:
    return jax.tree.map(lambda leaf: _along(scale, leaf).astype(leaf.dtype) * leaf, tree)


def _clipped(longest: float | None, due: Array, gradient: Any) -> Any:
    """Leaves [L, B, rows, columns]: each sequence's gradient of the layers that are due, no longer than ``longest``."""
    if longest is None:
        return gradient
    squares = jnp.stack([jnp.sum(jnp.square(leaf), axis=(-2, -1)) for leaf in jax.tree.leaves(gradient)], axis=-1)
    square = jnp.sum(jnp.where(_along(due, squares), squares, 0), axis=(0, -1))
    long = square > longest**2
    scale = jnp.where(long, longest * lax.rsqrt(jnp.where(long, square, 1)), 1)  # no root of 0, which has no slope
    return jax.tree.map(lambda leaf: leaf * scale[None, :, None, None].astype(leaf.dtype), gradient)


def _written(
    schedule: Schedule, index: int, rate: Float[Array, " L"], at: Any, due: Array, level: LevelState
) -> LevelState:
    """One level, written in all its layers, though only those that are ``due`` will be kept."""
    period, count = np.maximum(np.array(schedule.periods[index]), schedule.chunk), schedule.bptt(index)
    delta, state = level.delta, level.optimizer
    if count:
        constant = (jnp.asarray(at) // jnp.asarray(period)) % count == 0
        delta, state = _select(constant, lax.stop_gradient((delta, state)), (delta, state))
    update = jax.vmap(jax.vmap(schedule.writes.optimizer.build().update))
    mean = _scaled(jnp.asarray(schedule.chunk / period), level.gathered)
    directions, state = update(_clipped(schedule.writes.clip, due, mean), state)
    delta = jax.tree.map(jnp.subtract, delta, _scaled(rate, directions))
    if count == 0:
        delta, state = lax.stop_gradient((delta, state))
    return LevelState(delta, jax.tree.map(jnp.zeros_like, level.gathered), state)


def rates_of(model: Any, params: Any, schedule: Schedule) -> tuple[Float[Array, " L"], ...]:
    """eta of every level and layer: the learned ones, and the configured one for levels that training never wrote."""
    part = params["blocks"]["feed_forward"]
    learned = [part["rate"][:, i] for i in range(part["rate"].shape[-1])] if "rate" in part else []
    fixed = jnp.full(model.config.layers, schedule.writes.rate)
    return (*learned, *[fixed] * (len(schedule.periods) - len(learned)))


def reading_loss(model: Any, params: Any, inputs: Tokens, labels: Tokens) -> Nats:
    """Nats of every label of fresh sequences that are read with writes: the loss that training differentiates.

    Args:
      inputs, labels: [B, T], T a multiple of the fastest period; label t is the token after input t.

    Raises:
      UserError: T is no such multiple, or no level is written in training.
    """
    schedule = schedule_of(model, trained=True)
    if inputs.shape[1] % schedule.chunk:
        raise UserError(f"sequences have {inputs.shape[1]} tokens; expected a multiple of the period {schedule.chunk}")
    rates = rates_of(model, params, schedule)

    def run_chunk(carry: Any, tokens: Any, active: Any, due: Any) -> tuple[Any, Any]:
        del active, due  # of the chunk's start; writes are due at its end
        inputs, labels, at = tokens
        mixer, levels = carry
        levels, read = gather(model, params, schedule, mixer, levels, Chunk(inputs.T, labels.T))
        end = at[0] + schedule.chunk
        levels = write(schedule, rates, levels, end, schedule.due(end))
        return (read.mixer, set_back(schedule, levels, schedule.due(end))), read.nats.T

    fresh = model.init_state(params, batch=inputs.shape[0], capacity=inputs.shape[1])
    carry = fresh.mixer, fresh_levels(model, schedule, inputs.shape[0])
    tokens = inputs.T, labels.T, jnp.arange(inputs.shape[1])
    return scan_periods(run_chunk, carry, tokens, position=0, periods=schedule.distinct)[1].T
