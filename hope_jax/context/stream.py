"""What ``context.py`` does, as pure compiled programs: read a piece of a stream, end a chunk, end a stream, clear.

A stream's state holds the tokens of its unfinished chunk and the mixers' states at that chunk's start (the anchor): the
chunk is read again when it is complete, with gradients, and only then taken up. Nothing here checks its arguments.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from hope_jax.context.checks import is_finite
from hope_jax.context.writes import (
    Carry,
    Nats,
    Plan,
    begin,
    cross_entropy,
    gather,
    plan_of,
    rates_of,
    read_chunks,
    reading_state,
    write,
    write_rest,
)
from hope_jax.nn.feed_forward.fast import ContextState, InterruptedState
from hope_jax.nn.language_model import BlockState
from hope_jax.types import Array, Bool, Float, Int, Tokens

Open = ContextState | InterruptedState


def inside_of(state: Open) -> ContextState:
    """The state without the mark of an interruption."""
    return state.state if isinstance(state, InterruptedState) else state


def around(model: Any, blocks: BlockState, batch: int) -> ContextState:
    """The state of streams that learned nothing yet and go on from ``blocks``."""
    carry = begin(model, plan_of(model, trained=False), blocks, batch)
    return state_of(model, carry, jnp.zeros((batch, 0), jnp.int32), jnp.zeros((), jnp.int32))


def state_of(model: Any, carry: Carry, tokens: Tokens, position: Int[Array, ""]) -> ContextState:
    """The state of a stream that has taken up ``position`` tokens; ``tokens`` are those that it has not."""
    blocks = reading_state(model, carry)
    return ContextState(blocks, carry.mixer, tokens, position, carry.gathered, carry.optimizer)


def carry_of(state: ContextState) -> Carry:
    """What the tokens that were taken up left to the unfinished chunk."""
    return Carry(state.anchor, state.blocks.feed_forward.fast, state.gathered, state.optimizer)


@functools.partial(jax.jit, static_argnames="model")
def learn(
    model: Any, params: Any, state: Open, tokens: Tokens
) -> tuple[Nats, Float[Array, "B vocab"], Bool[Array, ""], ContextState]:
    """Losses of ``tokens``, the logits after the last of them, whether all is finite, and the state."""
    plan = plan_of(model, trained=False)
    if isinstance(state, InterruptedState):
        state = resumed(model, params, plan, state.state)
    every, carry = jnp.concatenate([state.tokens, tokens], axis=1), carry_of(state)
    whole, nats = (every.shape[1] - 1) // plan.chunk * plan.chunk, []
    if whole:
        known, labels = every[:, :whole], every[:, 1 : whole + 1]
        carry, first = read_chunks(model, params, plan, carry, known, labels, state.position)
        nats.append(first)
    rest, position = every[:, whole:], (state.position + whole) % plan.distinct[-1]
    after = state_of(model, carry, rest, position)
    logits, blocks = model.apply({"params": params}, rest, after.blocks)
    nats.append(cross_entropy(logits[:, :-1], rest[:, 1:]))
    losses = jnp.concatenate(nats, axis=1)[:, max(0, state.tokens.shape[1] - 1) :]
    finite = is_finite(losses, logits, carry.fast, carry.gathered)
    return losses, logits[:, -1], finite, after._replace(blocks=blocks)


def resumed(model: Any, params: Any, plan: Plan, state: ContextState) -> ContextState:
    """Ready to learn what comes after an interruption: the chunk before it ends there, if there was any."""
    if state.tokens.shape[1] <= 1:  # no label was learned yet
        return state_of(model, carry_of(state)._replace(mixer=state.blocks.mixer), state.tokens[:, :0], state.position)
    at = state.position + plan.chunk
    carry = write(plan, rates_of(model, params, plan), ended(model, params, plan, state), at)
    return state_of(model, carry, state.tokens[:, :0], at % plan.distinct[-1])


def ended(model: Any, params: Any, plan: Plan, state: ContextState) -> Carry:
    """The unfinished chunk gathered as far as it goes; the mixers as they are now."""
    carry = carry_of(state)
    if state.tokens.shape[1] > 1:
        carry, _ = gather(model, params, plan, carry, state.tokens[:, :-1], state.tokens[:, 1:])
    return carry._replace(mixer=state.blocks.mixer)


@functools.partial(jax.jit, static_argnames="model")
def finish(model: Any, params: Any, state: Open) -> tuple[ContextState, Bool[Array, ""]]:
    """The state at the end of a stream, all that was gathered written; whether it is finite."""
    plan, inside = plan_of(model, trained=False), inside_of(state)
    carry, more = ended(model, params, plan, inside), inside.tokens.shape[1] > 1
    carry = write_rest(plan, rates_of(model, params, plan), carry, inside.position, more)
    after = state_of(model, carry, inside.tokens[:, :0], jnp.zeros((), jnp.int32))
    return after, is_finite(carry.fast)


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def clear(model: Any, params: Any, state: Open, capacity: int | None) -> tuple[ContextState, Bool[Array, ""]]:
    """The state with fresh mixers, the chunk before them ended; whether it is finite."""
    resume = resumed(model, params, plan_of(model, trained=False), inside_of(state))
    mixer = model.init_state(params, resume.tokens.shape[0], capacity).mixer
    blocks = BlockState(mixer, resume.blocks.feed_forward)
    return resume._replace(blocks=blocks, anchor=mixer), is_finite(blocks.feed_forward, resume.gathered)
