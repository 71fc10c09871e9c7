"""A memory that keeps learning: read a stream, and let the levels of the model store what it says (SPEC 3.1).

>>> state = model.init_state(params, batch=1)
>>> loss, state = context.learn(model, params, state, document)          # in pieces of any size
>>> logits, state = model.apply({"params": params}, question, state)     # reads with what was learned, writes nothing
>>> context.save(path, model, state); state = context.load(path, model, params)

The weights of a level move once per period, so the tokens of an unfinished chunk are kept and read again when it is
complete (at most one period of the fastest level): that way any cut of a stream into calls gives the same result.
Where a stream ends inside a chunk, ``finish`` makes every level store what it has gathered.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from hope_jax.errors import UserError
from hope_jax.nn.attention import slots_of
from hope_jax.nn.fast import ContextState, FastState, InterruptedState, as_matrix
from hope_jax.nn.language_model import BlockState, check_tokens
from hope_jax.train.array_file import load_arrays, save_arrays
from hope_jax.train.digests import kind, leaves
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
    nats, finite, after = _learn(model, params, state, tokens.astype(jnp.int32))
    _require_finite(finite)
    return nats, after


def finish(model: Any, params: Any, state: State) -> ContextState:
    """End the stream here: every level stores what it has gathered, be its period over or not.

    A token counts as much as in a full period. What follows is read with all that, and starts a chunk of its own.
    """
    after, finite = _finish(model, params, _checked(model, params, state, _batch(state)))
    _require_finite(finite)
    return after


def reset(model: Any, state: State, level: int | None = None) -> State:
    """Forget what a level has stored and gathered, or all levels (None); what the mixers have read stays.

    Raises:
      UserError: there is no such level.
    """
    given, state = state, _entered(model, state)
    count = len(state.gathered)
    if level is not None and not 0 <= level < count:
        raise UserError(f"level is {level}; the model's levels are 0 to {count - 1}, fastest first")
    plan = plan_of(model, trained=False)
    fresh = begin(model, plan, state.blocks, _batch(state))
    pick = lambda new, old: tuple(n if level in (None, i) else o for i, (n, o) in enumerate(zip(new, old, strict=True)))  # noqa: E731
    mine = _carry(state)
    carry = Carry(
        mine.mixer,
        pick(fresh.fast, mine.fast),
        pick(fresh.gathered, mine.gathered),
        pick(fresh.optimizer, mine.optimizer),
    )
    blocks = BlockState(state.blocks.mixer, FastState(carry.fast))
    after = _state(model, carry, state.tokens, state.position)._replace(blocks=blocks)
    return InterruptedState(after) if isinstance(given, InterruptedState) else after


def merge(model: Any, params: Any, state: State) -> tuple[Any, State]:
    """Make what was learned the model's own: parameters with Delta in them, and the state without it.

    The new parameters read as the old ones did with Delta, up to rounding. Of several streams the mean is taken.
    """
    ours = jax.tree.map(lambda leaf: leaf, params["blocks"]["feed_forward"])  # containers of our own
    trees = _entered(model, state).blocks.feed_forward.fast
    for place, fast in zip(model.config.feed_forward.kernels(ours), trees, strict=True):
        for name, delta in fast.items():
            moved = jnp.mean(as_matrix(delta, place.get(f"{name}_basis")), axis=1)
            place[name] = {**place[name], "kernel": place[name]["kernel"] + moved.astype(place[name]["kernel"].dtype)}
    return params | {"blocks": params["blocks"] | {"feed_forward": ours}}, reset(model, state)


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
        for name in sorted(now.keys() | about["config"].keys()):
            there, here = (config.get(name, "absent") for config in (about["config"], now))
            if there != here:
                raise UserError(f"the context in {path} is of another model: {name} is {there} there and {here} here")
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
    return jax.tree.leaves(state.blocks if isinstance(state, ContextState | InterruptedState) else state)[0].shape[1]


def _entered(model: Any, state: State) -> ContextState:
    """The state with a place for Delta, without the mark of an interruption."""
    if isinstance(state, InterruptedState):
        return state.state
    return state if isinstance(state, ContextState) else _around(model, state, _batch(state))


def _checked(model: Any, params: Any, state: State, batch: int) -> ContextState | InterruptedState:
    """The state, if it is one of this model and of so many sequences."""
    if not isinstance(state, BlockState | ContextState | InterruptedState):
        raise UserError(f"the state is a {type(state).__name__}; expected one of model.init_state or context.learn")
    if isinstance(state, BlockState):
        expected = jax.eval_shape(lambda: model.init_state(params, batch, slots_of(state)))
        _same_kinds(state, expected)
        return _around(model, state, batch)
    inside = state.state if isinstance(state, InterruptedState) else state
    expected = jax.eval_shape(lambda: start(model, params, batch, slots_of(inside.blocks)))
    unfinished = jax.ShapeDtypeStruct((batch, inside.tokens.shape[1]), jnp.int32)
    _same_kinds(inside, expected._replace(tokens=unfinished))
    return state


def _same_kinds(state: Any, expected: Any) -> None:
    found, wanted = ({name: kind(leaf) for name, leaf in leaves(tree)} for tree in (state, expected))
    for name in sorted(found.keys() | wanted.keys()):
        there, here = found.get(name, "absent"), wanted.get(name, "absent")
        if there != here:
            raise UserError(f"the state is of another model, batch size or dtype: {name} is {there}; expected {here}")


def _require_finite(finite: Bool[Array, ""]) -> None:
    if not isinstance(finite, Tracer) and not finite:
        raise UserError(
            "this made losses or weights that are not finite, so nothing was learned: the parameters or the state are "
            "damaged, or the rate of a level is too high"
        )


def _is_finite(*trees: Any) -> Bool[Array, ""]:
    return jnp.isfinite(sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(trees)))


@functools.partial(jax.jit, static_argnames="model")
def _learn(
    model: Any, params: Any, state: ContextState | InterruptedState, tokens: Tokens
) -> tuple[Nats, Bool[Array, ""], ContextState]:
    """Losses of ``tokens``, whether all is finite, and the state after them."""
    plan = plan_of(model, trained=False)
    if isinstance(state, InterruptedState):
        carry = write(plan, rates_of(model, params, plan), _ended(model, params, plan, state), _next(state, plan.chunk))
        state = _state(model, carry, state.state.tokens[:, :0], _next(state, plan.chunk))
    every, carry = jnp.concatenate([state.tokens, tokens], axis=1), _carry(state)
    whole, nats = (every.shape[1] - 1) // plan.chunk * plan.chunk, []
    if whole:
        known, labels = every[:, :whole], every[:, 1 : whole + 1]
        carry, first = read_chunks(model, params, plan, carry, known, labels, state.position)
        nats.append(first)
    after, rest = _state(model, carry, every[:, whole:], state.position + whole), every[:, whole:]
    logits, blocks = model.apply({"params": params}, rest, after.blocks)
    nats.append(cross_entropy(logits[:, :-1], rest[:, 1:]))
    losses = jnp.concatenate(nats, axis=1)[:, max(0, state.tokens.shape[1] - 1) :]
    return losses, _is_finite(losses, carry.fast, carry.gathered), after._replace(blocks=blocks)


def _next(state: ContextState | InterruptedState, period: int) -> Int[Array, ""]:
    position = state.state.position if isinstance(state, InterruptedState) else state.position
    return (position // period + 1) * period


def _ended(model: Any, params: Any, plan: Plan, state: ContextState | InterruptedState) -> Carry:
    """The unfinished chunk gathered as far as it goes; the mixers as they are now."""
    inside = state.state if isinstance(state, InterruptedState) else state
    carry = _carry(inside)
    if inside.tokens.shape[1] > 1:
        carry, _ = gather(model, params, plan, carry, inside.tokens[:, :-1], inside.tokens[:, 1:])
    return carry._replace(mixer=inside.blocks.mixer)


@functools.partial(jax.jit, static_argnames="model")
def _finish(model: Any, params: Any, state: ContextState | InterruptedState) -> tuple[ContextState, Bool[Array, ""]]:
    plan, inside = plan_of(model, trained=False), state.state if isinstance(state, InterruptedState) else state
    at = _next(state, plan.distinct[-1])  # a multiple of every period: all are due
    carry = write(plan, rates_of(model, params, plan), _ended(model, params, plan, state), at)
    after = _state(model, carry, inside.tokens[:, :0], at)
    return after, _is_finite(carry.fast)
