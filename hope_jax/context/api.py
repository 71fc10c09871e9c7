"""A memory that keeps learning: read a stream, and let the levels of the model store what it says (SPEC 3.1).

>>> state = model.init_state(params, batch=1)
>>> loss, state = context.learn(model, params, state, document)          # in pieces of any size
>>> logits, state = model.apply({"params": params}, question, state)     # reads with what was learned, writes nothing
>>> context.save(path, model, params, state); state = context.load(path, model, params)

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

from hope_jax.config import flatten
from hope_jax.context import stream as streams
from hope_jax.context.checks import check_room, require_finite, same_kinds
from hope_jax.context.stream import carry_of, inside_of, state_of
from hope_jax.context.writes import Nats, begin, plan_of
from hope_jax.errors import UserError
from hope_jax.nn.feed_forward.fast import ContextState, FastState, InterruptedState, as_matrix
from hope_jax.nn.language_model import BlockState, check_tokens
from hope_jax.nn.mixers.attention import slots_of
from hope_jax.storage.array_file import another_model, load_arrays, read_about, save_arrays
from hope_jax.storage.digests import digest_arrays, first_difference
from hope_jax.types import Array, Float, Scalar

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
    return streams.around(model, model.init_state(params, batch, capacity), batch)


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

    The first token of a stream, and the first after an interruption, ``finish`` or ``clear``, is not predicted.
    """
    nats, _, after = _learned(model, params, state, tokens)
    return nats, after


def expect(model: Any, params: Any, state: State, tokens: Any) -> tuple[Float[Array, "B vocab"], ContextState]:
    """``learn``, with the logits of the token to come in the place of the loss."""
    _, logits, after = _learned(model, params, state, tokens)
    return logits, after


def _learned(model: Any, params: Any, state: State, tokens: Any) -> tuple[Nats, Float[Array, "B vocab"], ContextState]:
    tokens = jnp.asarray(tokens)
    check_tokens(tokens, model.config.vocab_size)
    state = _checked(model, params, state, tokens.shape[0])
    check_room(state, tokens)
    nats, logits, finite, after = streams.learn(model, params, state, tokens.astype(jnp.int32))
    require_finite(finite)
    return nats, logits, after


def finish(model: Any, params: Any, state: State) -> ContextState:
    """End the stream here: every level stores what it has gathered, be its period over or not.

    A token counts as much as in a full period; nested levels are not set back, and a level with nothing new is not
    written. What follows is read with all that, and starts periods of its own.
    """
    after, finite = streams.finish(model, params, _checked(model, params, state, _batch(state)))
    require_finite(finite)
    return after


def clear(model: Any, params: Any, state: State, capacity: int | None = None) -> ContextState:
    """Forget the context and keep what is stored: fresh mixers, levels as they are.

    For the next document of a stream, or to see what of the last one is in the levels. The unfinished chunk ends here,
    as at an interruption: its tokens count in the periods that go on. ``capacity`` is as in ``model.init_state``.
    """
    after, finite = streams.clear(model, params, _checked(model, params, state, _batch(state)), capacity)
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
        return state_of(model, fresh, inside.tokens[:, :0], jnp.zeros((), jnp.int32))
    swapped = lambda new, old: (*old[:level], new[level], *old[level + 1 :])  # noqa: E731
    after = inside._replace(
        blocks=BlockState(inside.blocks.mixer, FastState(swapped(fresh.fast, carry_of(inside).fast))),
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


def save(path: str | Path, model: Any, params: Any, state: State, note: Any = None) -> None:
    """Write the state as folder ``path``, replacing an older one when all is written. Raises UserError if it cannot.

    ``note``: JSON of your own that is kept with it, see ``note_of``.
    """
    kept = _entered(model, state)
    batch, unfinished = kept.tokens.shape
    about = {"batch": batch, "unfinished": unfinished, "interrupted": isinstance(state, InterruptedState)}
    about |= {"slots": slots_of(kept.blocks), "config": _identity(model, params), "note": note}
    save_arrays(Path(path), kept, about)


def load(path: str | Path, model: Any, params: Any) -> State:
    """The saved state, bit for bit: going on from it equals never having stopped.

    It belongs to the model and the parameters that it was made with; inner rates and ``bptt`` may be others.

    Raises:
      UserError: nothing is saved there, it is damaged, or it belongs to another model or other parameters.
    """
    path, was_interrupted = Path(path), []

    def like(about: dict[str, Any]) -> Any:
        if different := first_difference(about["config"], _identity(model, params)):
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


def note_of(path: str | Path) -> Any:
    """The ``note`` that was saved with a state. Raises UserError where nothing is saved or it is damaged."""
    return read_about(Path(path))["note"]


def _identity(model: Any, params: Any) -> dict[str, Any]:
    """What a saved state belongs to: Delta means nothing beside other weights. The rate of its writes may change."""
    free = ("feed_forward.writes.rate", "feed_forward.writes.bptt")
    sizes = {name: value for name, value in flatten(model.config).items() if not name.startswith(free)}
    part = {name: leaf for name, leaf in params["blocks"]["feed_forward"].items() if name != "rate"}
    weights = params | {"blocks": params["blocks"] | {"feed_forward": part}}
    # Square memories do not show which way round they are; states saved before they were kernels have no such entry.
    layout = {"memories": "kernels [in, out]"}
    return sizes | layout | {"parameters": f"those of digest {digest_arrays(weights)[:16]}"}


def _batch(state: State) -> int:
    if not isinstance(state, BlockState | ContextState | InterruptedState):
        raise UserError(f"the state is a {type(state).__name__}; expected one of model.init_state or context.learn")
    return jax.tree.leaves(state.blocks if isinstance(state, ContextState | InterruptedState) else state)[0].shape[1]


def _entered(model: Any, state: State) -> ContextState:
    """The state with a place for Delta, without the mark of an interruption."""
    batch = _batch(state)
    if isinstance(state, BlockState):
        return streams.around(model, state, batch)
    inside, plan = inside_of(state), plan_of(model, trained=False)
    expected = jax.eval_shape(lambda: begin(model, plan, inside.blocks, batch))
    same_kinds((inside.gathered, inside.optimizer), (expected.gathered, expected.optimizer))
    return inside


def _checked(model: Any, params: Any, state: State, batch: int) -> ContextState | InterruptedState:
    """The state, if it is one of this model and of so many sequences."""
    _batch(state)
    if isinstance(state, BlockState):
        same_kinds(state, _started.eval_shape(model, params, batch, slots_of(state))[0])
        return streams.around(model, state, batch)
    inside = inside_of(state)
    expected = _started.eval_shape(model, params, batch, slots_of(inside.blocks))[1]
    unfinished = jax.ShapeDtypeStruct((batch, inside.tokens.shape[1]), jnp.int32)
    same_kinds(inside, expected._replace(tokens=unfinished))
    return state


@functools.partial(jax.jit, static_argnames=("model", "batch", "capacity"))
def _started(model: Any, params: Any, batch: int, capacity: int | None) -> tuple[BlockState, ContextState]:
    """Fresh states; only their shapes are asked for, at every call: a jitted function is traced for them once."""
    return model.init_state(params, batch, capacity), start(model, params, batch, capacity)
