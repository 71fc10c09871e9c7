"""Writing text: read a prompt, then decode token by token with the carried state.

>>> state = model.init_state(params, batch=1)
>>> tokens, state = generate.sample(model, params, state, prompt, steps=100, key=key)
>>> more, state = generate.sample(model, params, state, tokens[:, -1:], steps=100, key=other_key)

The state that comes back has read the prompt and every written token but the last, which nobody has needed to read yet:
a session goes on with a prompt that starts with that token (the user's next words may follow it). With greedy decoding
the two calls above write exactly what one call of 200 steps writes.

Nothing is compiled twice for a model and batch: prompts are read in pieces of a few fixed lengths, the decoding loop
takes any number of steps, and temperature, top_k and top_p are data.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError

from hope_jax import context
from hope_jax.context.schedule import schedule_of
from hope_jax.errors import NotFinite, UserError, whole
from hope_jax.nn.feed_forward.fast import ContextState
from hope_jax.nn.language_model import check_tokens
from hope_jax.nn.room import room_left, slots_of
from hope_jax.sampling import Choice, check_key, choice, choose
from hope_jax.storage.digests import first_difference, kinds
from hope_jax.storage.programs import run_stored
from hope_jax.types import Array, Bool, Float, Int, PRNGKeyArray, Tokens

READS = (512, 64)  # lengths of the pieces a prompt is read in; the last one is filled up with padding
PIECE = 32  # most tokens written between two looks at them


def sample(
    model: Any,
    params: Any,
    state: Any,
    prompt: Array | np.ndarray,
    *,
    steps: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: PRNGKeyArray,
    learn: bool = False,
) -> tuple[Int[Array, "B steps"], Any]:
    """Continue ``prompt`` by ``steps`` tokens.

    Args:
      model, params, state: as in ``model.apply({"params": params}, tokens, state)``. The state may have read before.
      prompt: token ids ``[B, T]`` to read first, at least one per sequence.
      steps: tokens to write, at least 1.
      temperature: 0 takes the likeliest token (``key`` is then not used), 1 draws from the model's distribution. So
        small a number that float32 has no full precision for it counts as 0.
      top_k: draw among the ``top_k`` likeliest tokens only, 1 to vocabulary size.
      top_p: draw among the likeliest tokens that together hold this probability (of those ``top_k`` leaves), in (0, 1].
      key: random key. Equal keys give equal text; a longer call starts like a shorter one.
      learn: store what is read in the levels of the model, prompt and written tokens alike, as ``context.learn`` does:
        later tokens are chosen with the weights that the earlier ones wrote. Without it nothing is written.

    Returns:
      The written tokens, int32, and the state (which has not read the last of them; see the module docstring).

    Raises:
      UserError: a prompt no model can read, a setting out of range or of another type, a state of another batch size,
        more tokens than the caches have room for, a model whose logits are not finite, or ``learn`` and a
        model without levels.
    """
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "key": key, "learn": learn}
    written = []
    for piece, now in stream(model, params, state, prompt, steps=steps, **settings):
        written.append(piece)
        state = now
    return jnp.asarray(np.concatenate(written, axis=1)), state


def stream(
    model: Any,
    params: Any,
    state: Any,
    prompt: Array | np.ndarray,
    *,
    steps: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: PRNGKeyArray,
    learn: bool = False,
) -> Iterator[tuple[Int[np.ndarray, "B n"], Any]]:
    """As ``sample``, but yields pairs (the next few tokens, the state that belongs to them): stop after any of them.

    The first piece is one token, so that it comes as soon as the prompt is read. Mistakes raise at the call.
    """
    vocab = model.config.vocab_size
    try:  # on the host as it came: a device would cut large ids to 32 bits before anybody looks at them
        prompt = np.asarray(prompt)
    except (ValueError, TypeError) as error:
        raise UserError(f"prompt is no array ({error}); give token ids [batch, time], rows of equal length.") from error
    check_tokens(prompt, vocab, "prompt")
    check_key(key)
    if learn:
        schedule_of(model, trained=False)
    how = choice(vocab, temperature, top_k, top_p)
    _check_state(model, params, state, prompt.shape[0])
    room, needed = room_left(state), prompt.shape[1] + whole("steps", steps) - 1
    if room is not None and needed > room:
        asked = f"A prompt of {prompt.shape[1]} tokens and {steps} steps need room for {needed} tokens"
        mend = "make the state with a larger capacity, or ask for less"
        raise UserError(f"{asked}, and the cache has room for {room} more; {mend}.")
    pieces = _learning_pieces if learn else _pieces
    return pieces(model, params, state, prompt.astype(np.int32), steps, how, key)


def _check_state(model: Any, params: Any, state: Any, batch: int) -> None:
    """Raise UserError unless the mixers' states are such as ``model.init_state`` makes for so many sequences."""
    if not hasattr(model, "init_state"):  # any model will do; this one says nothing about its states
        return
    blocks = getattr(state, "blocks", state)
    if not hasattr(blocks, "mixer"):
        raise UserError(f"state is a {type(state).__name__}; give one of model.init_state or context.start.")
    slots = slots_of(blocks.mixer)
    try:
        expected = jax.eval_shape(lambda: model.init_state(params, batch, slots)).mixer
    except (KeyError, TypeError, FlaxError) as error:
        raise UserError(f"params are not those of this model: {str(error).splitlines()[0]}") from error
    if different := first_difference(kinds(blocks.mixer), kinds(expected)):
        where = f"state is not of this model with a prompt of {batch} sequences"
        raise UserError(f"{where}: {different[0]} is {different[1]}; expected {different[2]}.")


def _pieces(
    model: Any, params: Any, state: Any, prompt: Int[np.ndarray, "B T"], steps: int, how: Choice, key: PRNGKeyArray
) -> Iterator[tuple[Int[np.ndarray, "B n"], Any]]:
    learns, logits = isinstance(state, ContextState), None
    blocks = state.blocks if learns else state
    for tokens, count in _padded(prompt):
        logits, blocks = run_stored(_read, model, (params, tokens, blocks, count), like=(0, blocks))
    last, finite = _next(logits, key, 0, how)
    last = _checked(last, finite, 0)
    yield last[:, None], state.read_on(blocks.mixer) if learns else blocks
    for start in range(1, steps, PIECE):
        count = min(PIECE, steps - start)
        request = params, blocks, last, key, start, count, how
        tokens, finite, blocks = run_stored(_write, model, request, like=(0, 0, blocks))
        tokens = _checked(tokens, finite, start)[:, :count]
        last = tokens[:, -1]
        yield tokens, state.read_on(blocks.mixer) if learns else blocks


def _padded(prompt: Int[np.ndarray, "B T"]) -> Iterator[tuple[Int[np.ndarray, "B piece"], np.ndarray]]:
    """Pieces of the lengths ``READS``, and how many of their tokens are real."""
    at, (large, small) = 0, READS
    while at < prompt.shape[1]:
        size = large if prompt.shape[1] - at > large - small else small
        piece = prompt[:, at : at + size]
        yield np.pad(piece, ((0, 0), (0, size - piece.shape[1]))), np.asarray(piece.shape[1], np.int32)
        at += size


def _learning_pieces(
    model: Any, params: Any, state: Any, prompt: Int[np.ndarray, "B T"], steps: int, how: Choice, key: PRNGKeyArray
) -> Iterator[tuple[Int[np.ndarray, "B n"], Any]]:
    """As ``_pieces``, and levels are written whenever a chunk is over: inside it the weights stand still."""
    logits, state = context.expect(model, params, state, prompt)
    last, finite = _next(logits, key, 0, how)
    last = _checked(last, finite, 0)
    yield last[:, None], state
    start, chunk = 1, schedule_of(model, trained=False).chunk
    while start < steps:
        count = min(PIECE, steps - start, chunk - int(state.unfinished))
        if count:
            request = params, state.blocks, last, key, start, count, how
            tokens, finite, blocks = run_stored(_write, model, request, like=(0, 0, state.blocks))
            tokens = _checked(tokens, finite, start)[:, :count]
            state = state.within_chunk(np.concatenate([last[:, None], tokens[:, :-1]], axis=1), blocks.mixer)
        else:  # the last token completes the chunk before it, and is itself read with what that chunk taught
            logits, state = context.expect(model, params, state, last[:, None])
            tokens, finite = _next(logits, key, start, how)
            tokens, count = _checked(tokens, finite, start)[:, None], 1
        last = tokens[:, -1]
        yield tokens, state
        start += count


def _checked(tokens: Array, finite: Bool[Array, ""], start: int) -> Int[np.ndarray, "B *n"]:
    """The tokens on the host, if the model meant anything by them: JAX would compile a program for each cut of them."""
    if not finite:
        why = "its parameters or its state are damaged (a diverged training run, or a state that was carried after NaN)"
        raise NotFinite(f"The model's logits are not finite at or soon after written token {start}: {why}.")
    return np.asarray(tokens)


@functools.partial(jax.jit, static_argnames="model")
def _read(
    model: Any, params: Any, tokens: Tokens, state: Any, count: Int[Array, ""] | np.ndarray
) -> tuple[Float[Array, "B vocab"], Any]:
    """Logits after the last of the first ``count`` tokens, and the state then."""
    logits, state = model.apply({"params": params}, tokens, state, count)
    return logits[:, count - 1], state


@jax.jit
def _next(
    logits: Float[Array, "B vocab"], key: PRNGKeyArray, index: Any, how: Choice
) -> tuple[Int[Array, " B"], Bool[Array, ""]]:
    """Written token number ``index``, and whether the logits are finite."""
    return choose(logits, jax.random.fold_in(key, index), how), jnp.isfinite(logits).all()


@functools.partial(jax.jit, static_argnames="model")
def _write(
    model: Any, params: Any, state: Any, last: Int[Array, " B"], key: PRNGKeyArray, start: Any, count: Any, how: Choice
) -> tuple[Tokens, Bool[Array, ""], Any]:
    """``count`` times: read the last token, choose the next; step i of the whole text uses the i-th key.

    Returns ``[B, PIECE]`` tokens, of which ``count`` are written, whether all logits were finite, and the state.
    """

    def step(i, carry):
        tokens, last, finite, state = carry
        logits, state = model.apply({"params": params}, last[:, None], state)
        last = choose(logits[:, -1], jax.random.fold_in(key, start + i), how)
        return tokens.at[:, i].set(last), last, finite & jnp.isfinite(logits).all(), state

    tokens = jnp.zeros((last.shape[0], PIECE), jnp.int32)
    tokens, _, finite, state = jax.lax.fori_loop(0, count, step, (tokens, last, jnp.array(True), state))
    return tokens, finite, state
