"""States of streams: how they begin, how they are checked, how levels are forgotten or merged."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from hope_jax.context.schedule import schedule_of
from hope_jax.context.writes import Levels, fresh_levels
from hope_jax.errors import UserError
from hope_jax.nn.feed_forward.fast import BlockState, ContextState, as_matrix
from hope_jax.nn.mixers.attention import slots_of
from hope_jax.storage.digests import first_difference, kinds
from hope_jax.types import Array

State = BlockState | ContextState


def start(model: Any, params: Any, batch: int, capacity: int | None = None) -> ContextState:
    """The state of ``batch`` fresh streams in which every level of the model can be written, whatever its period.

    Args:
      model, params: a model whose feed-forward part has levels.
      batch, capacity: as in ``model.init_state``; a model with full attention can read ``capacity`` tokens in all.

    Raises:
      UserError: the model has no levels, their periods are not multiples of one another, or ``batch`` is below 1.
    """
    schedule_of(model, trained=False)
    return _started(model, params, batch, capacity)


def fresh_mixer(model: Any, params: Any, batch: int, capacity: int | None) -> Any:
    """The mixers' states before the first token."""
    return _started(model, params, batch, capacity).mixer


@functools.partial(jax.jit, static_argnames=("model", "batch", "capacity"))
def _started(model: Any, params: Any, batch: int, capacity: int | None) -> ContextState:
    return _around(model, model.init_state(params, batch, capacity).mixer, batch)


def entered(model: Any, state: State) -> ContextState:
    """The state with a place for what will be learned: what was read before is context."""
    return state if isinstance(state, ContextState) else _around(model, state.mixer, batch_of(state))


def _around(model: Any, mixer: Any, batch: int) -> ContextState:
    """The state of mixers whose levels have learned nothing."""
    schedule = schedule_of(model, trained=False)
    tokens, zero = jnp.zeros((batch, schedule.chunk), jnp.int32), jnp.zeros((), jnp.int32)
    levels = fresh_levels(model, schedule, batch)
    return ContextState(mixer, mixer, levels, tokens, zero, jnp.zeros((), bool), zero)


def batch_of(state: State) -> int:
    """How many streams there are. Raises UserError for what is no state."""
    if isinstance(state, ContextState):
        return state.tokens.shape[0]
    if isinstance(state, BlockState):
        return jax.tree.leaves(state)[0].shape[1]
    raise UserError(f"the state is a {type(state).__name__}; expected one of model.init_state or context.learn")


def checked(model: Any, params: Any, state: State, batch: int) -> ContextState:
    """The state, if it is one of this model and of so many streams. Raises UserError otherwise."""
    batch_of(state)
    expected = shapes(model, params, batch, slots_of(state))
    same_kinds(state, expected.blocks._replace(feed_forward=()) if isinstance(state, BlockState) else expected)
    return entered(model, state)


def shapes(model: Any, params: Any, batch: int, capacity: int | None) -> ContextState:
    """Shapes and dtypes of a state; traced once for each kind."""
    return _started.eval_shape(model, params, batch, capacity)


def same_kinds(state: Any, expected: Any) -> None:
    """Raise UserError unless all arrays have the expected dtypes and shapes."""
    if different := first_difference(kinds(state), kinds(expected)):
        name, there, here = different
        raise UserError(f"the state is of another model, batch size or dtype: {name} is {there}; expected {here}")


def reset(model: Any, state: State, level: int | None = None) -> ContextState:
    """Forget what a level has stored and gathered, or all levels (None); what the mixers have read stays.

    Of one level, the tokens of the unfinished chunk are learned still when it is over; of all, they are forgotten too.

    Raises:
      UserError: there is no such level, or the state is of another model.
    """
    batch = batch_of(state)
    now = entered(model, state)
    fresh = fresh_levels(model, schedule_of(model, trained=False), batch)
    same_kinds(now.levels, fresh)
    if level is None:
        return _around(model, now.mixer, batch)
    if not 0 <= level < len(fresh):
        raise UserError(f"level is {level}; the model's levels are 0 to {len(fresh) - 1}, fastest first")
    return now._replace(levels=(*now.levels[:level], fresh[level], *now.levels[level + 1 :]))


def with_deltas(model: Any, params: Any, levels: Levels) -> Any:
    """Parameters with the mean Delta of all streams in them."""
    part = jax.tree.map(lambda leaf: leaf, params["blocks"]["feed_forward"])  # its containers are copies
    for place, level in zip(model.config.feed_forward.kernels(part), levels, strict=True):
        for name, delta in level.delta.items():
            kernel: Array = place[name]["kernel"]
            moved = jnp.mean(as_matrix(delta, place.get(f"{name}_basis")), axis=1)
            place[name] = {**place[name], "kernel": kernel + moved.astype(kernel.dtype)}
    return params | {"blocks": params["blocks"] | {"feed_forward": part}}
