"""A memory that keeps learning: read a stream, and let the levels of the model store what it says (SPEC 3.1).

>>> state = model.init_state(params, batch=1)
>>> loss, state = context.learn(model, params, state, document)          # in pieces of any size
>>> logits, state = model.apply({"params": params}, question, state)     # reads with what was learned, writes nothing
>>> context.save(path, model, state); state = context.load(path, model, params)

The weights of a level move once per period, so the tokens of an unfinished chunk are kept and read again when it is
complete (at most one period of the fastest level): that way any cut of a stream into calls gives the same result. Each
number of unfinished and new tokens is a program of its own: feed pieces of one length, a multiple of that period.
Where a stream ends inside a chunk, ``finish`` makes every level store what it has gathered.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hope_jax.context_checks import check_room, is_finite, require_finite, same_kinds
from hope_jax.errors import UserError
from hope_jax.nn.attention import slots_of
from hope_jax.nn.fast import ContextState, FastState, InterruptedState, as_matrix
from hope_jax.nn.language_model import BlockState, check_tokens
from hope_jax.train.array_file import another_model, load_arrays, save_arrays
from hope_jax.train.digests import first_difference
from hope_jax.train.run_folder import flatten
from hope_jax.types import Array, Bool, Int, Scalar, Tokens
from hope_jax.writes import (
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

State = BlockState | ContextState | InterruptedState


def start(model: Any, params: Any, batch: int, capacity: int | None = None) -> ContextState:
    """The state of ``batch`` fresh streams in which every level of the model can be written, whatever its period.

    Args:
      model, params: a model whose feed-forward part has levels.
      batch, capacity: as in ``model.init_state``; a model with full attention can read ``capacity`` tokens in all.

    Raises:
      UserError: the model has no levels, or their periods are not multiples of one another.
    """
    plan_of(model, trained=False)
    return _around(model, model.init_state(params, batch, capacity), batch)


def _around(model: Any, blocks: BlockState, batch: int) -> ContextState:
    """The state of streams that learned nothing yet and go on from ``blocks``."""
    carry = begin(model, plan_of(model, trained=False), blocks, batch)
    return _state(model, carry, jnp.zeros((batch, 0), jnp.int32), jnp.zeros((), jnp.int32))


def _state(model: Any, carry: Carry, tokens: Tokens, position: Int[Array, ""]) -> ContextState:
    blocks = reading_state(model, carry)
    return ContextState(blocks, carry.mixer, tokens, position, carry.gathered, carry.optimizer)


def _carry(state: ContextState) -> Carry:
    return Carry(state.anchor, state.blocks.feed_forward.fast, state.gathered, state.optimizer)


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
      UserError: tokens the model cannot read, a state of another model or batch size, or losses or weights that are
        not finite. The state that was given is as good as before.
    """
    nats, state = surprise(model, params, state, tokens)
    return jnp.sum(nats) / max(1, nats.size), state


def surprise(model: Any, params: Any, state: State, tokens: Any) -> tuple[Nats, ContextState]:
    """``learn``, with the loss of every token in nats, [B, T]; [B, T-1] where nothing that was learned is before them.

    The first token of a stream, and the first after an interruption or ``finish``, is not predicted.
    """
    tokens = jnp.asarray(tokens)
    check_tokens(tokens, model.config.vocab_size)
    state = _checked(model, params, state, tokens.shape[0])
    check_room(state, tokens)
    nats, finite, after = _learn(model, params, state, tokens.astype(jnp.int32))
    require_finite(finite)
    return nats, after


def finish(model: Any, params: Any, state: State) -> ContextState:
    """End the stream here: every level stores what it has gathered, be its period over or not.

    A token counts as much as in a full period; nested levels are not set back, and a level with nothing new is not
    written. What follows is read with all that, and starts periods of its own.
    """
    after, finite = _finish(model, params, _checked(model, params, state, _batch(state)))
    require_finite(finite)
    return after


def reset(model: Any, state: State, level: int | None = None) -> ContextState | InterruptedState:
    """Forget what a level has stored and gathered, or all levels (None); what the mixers have read stays.

    Of one level, the tokens of the unfinished chunk are learned still when it is over; of all, they are forgotten too.

    Raises:
      UserError: there is no such level.
    """
    inside = _entered(model, state)
    count = len(inside.gathered)
    if level is not None and not 0 <= level < count:
        raise UserError(f"level is {level}; the model's levels are 0 to {count - 1}, fastest first")
    fresh = begin(model, plan_of(model, trained=False), inside.blocks, _batch(state))
    if level is None:
        return _state(model, fresh, inside.tokens[:, :0], jnp.zeros((), jnp.int32))
    swapped = lambda new, old: (*old[:level], new[level], *old[level + 1 :])  # noqa: E731
    after = inside._replace(
        blocks=BlockState(inside.blocks.mixer, FastState(swapped(fresh.fast, _carry(inside).fast))),
        gathered=swapped(fresh.gathered, inside.gathered),
        optimizer=swapped(fresh.optimizer, inside.optimizer),
    )
    return InterruptedState(after) if isinstance(state, InterruptedState) else after


def merge(model: Any, params: Any, state: State) -> tuple[Any, ContextState]:
    """Make what was learned the model's own: parameters with Delta in them, and the state without it.

    The stream is brought to an end first (``finish``); the new parameters read as the old ones did then, up to
    rounding. Of several streams the mean is taken.

    Raises:
      UserError: a state of another model.
    """
    state = finish(model, params, state)
    ours = jax.tree.map(lambda leaf: leaf, params["blocks"]["feed_forward"])  # containers of our own
    trees = state.blocks.feed_forward.fast
    for place, fast in zip(model.config.feed_forward.kernels(ours), trees, strict=True):
        for name, delta in fast.items():
            moved = jnp.mean(as_matrix(delta, place.get(f"{name}_basis")), axis=1)
            place[name] = {**place[name], "kernel": place[name]["kernel"] + moved.astype(place[name]["kernel"].dtype)}
    emptied: Any = reset(model, state)
    return params | {"blocks": params["blocks"] | {"feed_forward": ours}}, emptied


def save(path: str | Path, model: Any, state: State) -> None:
    """Write the state as folder ``path``, replacing an older one when all is written. Raises UserError if it cannot."""
    kept = _entered(model, state)
    batch, unfinished = kept.tokens.shape
    about = {"batch": batch, "unfinished": unfinished, "interrupted": isinstance(state, InterruptedState)}
    about |= {"slots": slots_of(kept.blocks), "config": flatten(model.config, "")}
    save_arrays(Path(path), kept, about)


def load(path: str | Path, model: Any, params: Any) -> State:
    """The saved state, bit for bit: going on from it equals never having stopped.

    Raises:
      UserError: nothing is saved there, it is damaged, or it belongs to another model.
    """
    path, was_interrupted = Path(path), []

    def like(about: dict[str, Any]) -> Any:
        now = flatten(model.config, "")
        if different := first_difference(about["config"], now):
            raise another_model(path, different)
        was_interrupted.append(about["interrupted"])
        shapes = jax.eval_shape(lambda: start(model, params, about["batch"], about["slots"]))
        tokens = jax.ShapeDtypeStruct((about["batch"], about["unfinished"]), jnp.int32)
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes._replace(tokens=tokens)
        )

    state = load_arrays(path, like)
    return InterruptedState(state) if was_interrupted[0] else state


def _batch(state: State) -> int:
    if not isinstance(state, BlockState | ContextState | InterruptedState):
        raise UserError(f"the state is a {type(state).__name__}; expected one of model.init_state or context.learn")
    return jax.tree.leaves(state.blocks if isinstance(state, ContextState | InterruptedState) else state)[0].shape[1]


def _inside(state: ContextState | InterruptedState) -> ContextState:
    """The state without the mark of an interruption."""
    return state.state if isinstance(state, InterruptedState) else state


def _entered(model: Any, state: State) -> ContextState:
    """The state with a place for Delta, without the mark of an interruption."""
    batch = _batch(state)
    if isinstance(state, BlockState):
        return _around(model, state, batch)
    inside, plan = _inside(state), plan_of(model, trained=False)
    expected = jax.eval_shape(lambda: begin(model, plan, inside.blocks, batch))
    same_kinds((inside.gathered, inside.optimizer), (expected.gathered, expected.optimizer))
    return inside


def _checked(model: Any, params: Any, state: State, batch: int) -> ContextState | InterruptedState:
    """The state, if it is one of this model and of so many sequences."""
    _batch(state)
    if isinstance(state, BlockState):
        expected = jax.eval_shape(lambda: model.init_state(params, batch, slots_of(state)))
        same_kinds(state, expected)
        return _around(model, state, batch)
    inside = _inside(state)
    expected = jax.eval_shape(lambda: start(model, params, batch, slots_of(inside.blocks)))
    unfinished = jax.ShapeDtypeStruct((batch, inside.tokens.shape[1]), jnp.int32)
    same_kinds(inside, expected._replace(tokens=unfinished))
    return state


@functools.partial(jax.jit, static_argnames="model")
def _learn(
    model: Any, params: Any, state: ContextState | InterruptedState, tokens: Tokens
) -> tuple[Nats, Bool[Array, ""], ContextState]:
    """Losses of ``tokens``, whether all is finite, and the state after them."""
    plan = plan_of(model, trained=False)
    if isinstance(state, InterruptedState):
        state = _resumed(model, params, plan, state.state)
    every, carry = jnp.concatenate([state.tokens, tokens], axis=1), _carry(state)
    whole, nats = (every.shape[1] - 1) // plan.chunk * plan.chunk, []
    if whole:
        known, labels = every[:, :whole], every[:, 1 : whole + 1]
        carry, first = read_chunks(model, params, plan, carry, known, labels, state.position)
        nats.append(first)
    after, rest = _state(model, carry, every[:, whole:], (state.position + whole) % plan.distinct[-1]), every[:, whole:]
    logits, blocks = model.apply({"params": params}, rest, after.blocks)
    nats.append(cross_entropy(logits[:, :-1], rest[:, 1:]))
    losses = jnp.concatenate(nats, axis=1)[:, max(0, state.tokens.shape[1] - 1) :]
    return losses, is_finite(losses, logits, carry.fast, carry.gathered), after._replace(blocks=blocks)


def _resumed(model: Any, params: Any, plan: Plan, state: ContextState) -> ContextState:
    """Ready to learn what comes after an interruption: the chunk before it ends there, if there was any."""
    if state.tokens.shape[1] <= 1:  # no label was learned yet
        return _state(model, _carry(state)._replace(mixer=state.blocks.mixer), state.tokens[:, :0], state.position)
    at = state.position + plan.chunk
    carry = write(plan, rates_of(model, params, plan), _ended(model, params, plan, state), at)
    return _state(model, carry, state.tokens[:, :0], at % plan.distinct[-1])


def _ended(model: Any, params: Any, plan: Plan, state: ContextState) -> Carry:
    """The unfinished chunk gathered as far as it goes; the mixers as they are now."""
    carry = _carry(state)
    if state.tokens.shape[1] > 1:
        carry, _ = gather(model, params, plan, carry, state.tokens[:, :-1], state.tokens[:, 1:])
    return carry._replace(mixer=state.blocks.mixer)


@functools.partial(jax.jit, static_argnames="model")
def _finish(model: Any, params: Any, state: ContextState | InterruptedState) -> tuple[ContextState, Bool[Array, ""]]:
    plan, inside = plan_of(model, trained=False), _inside(state)
    carry, more = _ended(model, params, plan, inside), inside.tokens.shape[1] > 1
    carry = write_rest(plan, rates_of(model, params, plan), carry, inside.position, more)
    after = _state(model, carry, inside.tokens[:, :0], jnp.zeros((), jnp.int32))
    return after, is_finite(carry.fast)
