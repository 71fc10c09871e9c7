"""Writing text: read a prompt, then decode token by token with the carried state.

>>> state = model.init_state(params, batch=1)
>>> tokens, state = generate.sample(model, params, state, prompt, steps=100, key=key)
>>> more, state = generate.sample(model, params, state, tokens[:, -1:], steps=100, key=other_key)

The state that comes back has read the prompt and every written token but the last, which nobody has needed to read yet:
a session goes on with a prompt that starts with that token (the user's next words may follow it). With greedy decoding
the two calls above write exactly what one call of 200 steps writes.

Nothing is compiled twice for a model and batch: prompts are read in pieces of a few fixed lengths (any cut of a
sequence gives the same result), the decoding loop takes any number of steps, and temperature, top_k and top_p are data.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax import context
from hope_jax.context.writes import plan_of
from hope_jax.errors import UserError
from hope_jax.nn.language_model import check_tokens
from hope_jax.nn.mixers.attention import room_left
from hope_jax.types import Array, Bool, Float, Int, PRNGKeyArray, Scalar, Tokens

READS = (512, 64, 8, 1)  # lengths of the pieces a prompt is read in
PIECE = 32  # most tokens written between two looks at them


class Choice(NamedTuple):
    """How a token is chosen. ``mode``: 0 the likeliest, 1 at random, 2 at random among the likeliest few."""

    mode: Int[Array, ""]
    temperature: Scalar
    top_k: Int[Array, ""]
    top_p: Scalar


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
    on_token: Callable[[np.ndarray], Any] | None = None,
) -> tuple[Int[Array, "B steps"], Any]:
    """Continue ``prompt`` by ``steps`` tokens.

    Args:
      model, params, state: as in ``model.apply({"params": params}, tokens, state)``. The state may have read before.
      prompt: token ids ``[B, T]`` to read first, at least one per sequence.
      steps: tokens to write, at least 1.
      temperature: 0 takes the likeliest token (``key`` is then not used), 1 draws from the model's distribution.
      top_k: draw among the ``top_k`` likeliest tokens only, 1 to vocabulary size.
      top_p: draw among the likeliest tokens that together hold this probability (of those ``top_k`` leaves), in (0, 1].
      key: random key. Equal keys give equal text; a longer call starts like a shorter one.
      learn: store what is read in the levels of the model, prompt and written tokens alike, as ``context.learn`` does:
        later tokens are chosen with the weights that the earlier ones wrote. Without it nothing is written.
      on_token: called with the tokens ``[B]`` of each step, in order, a few steps at a time as they are written.

    Returns:
      The written tokens, int32, and the state (which has not read the last of them; see the module docstring).

    Raises:
      UserError: a prompt no model can read, a setting out of range, more tokens than the attention caches have room
        for, a model whose logits are not finite, or ``learn`` and a model without levels.
    """
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "key": key, "learn": learn}
    written, end = [], state
    for piece, end in stream(model, params, state, prompt, steps=steps, **settings):  # noqa: B007, the last state is returned
        written.append(piece)
        if on_token is not None:
            for tokens in piece.T:
                on_token(tokens)
    return jnp.asarray(np.concatenate(written, axis=1)), end


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

    The first piece is one token, so that it comes as soon as the prompt is read. Mistakes raise at the call. With
    ``learn``, the prompt is read by ``context.expect``: each number of unfinished and new tokens compiles.
    """
    prompt, vocab = jnp.asarray(prompt), model.config.vocab_size
    check_tokens(prompt, vocab)
    if learn:
        plan_of(model, trained=False)
    how = _choice(vocab, temperature, top_k, top_p)
    _check_room(state, prompt.shape[1], steps)
    pieces = _learning_pieces if learn else _pieces
    return pieces(model, params, state, prompt.astype(jnp.int32), steps, how, key)


def _choice(vocab: int, temperature: float, top_k: int | None, top_p: float | None) -> Choice:
    """The settings, checked, as arrays."""
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature is {temperature}; give 0 for the likeliest token, or a positive number.")
    if top_k is not None and not 1 <= top_k <= vocab:
        raise UserError(f"top_k is {top_k}; give 1 to {vocab} (the vocabulary), or None for all tokens.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; give a probability above 0 and at most 1, or None for all tokens.")
    mode = 0 if temperature == 0 else 1 if top_k is None and top_p is None else 2
    whole, real = functools.partial(jnp.asarray, dtype=jnp.int32), functools.partial(jnp.asarray, dtype=jnp.float32)
    return Choice(whole(mode), real(temperature or 1), whole(top_k or vocab), real(top_p or 1))


def _check_room(state: Any, time: int, steps: int) -> None:
    if steps < 1:
        raise UserError(f"steps is {steps}; ask for at least 1 token.")
    room, needed = room_left(state), time + steps - 1
    if room is not None and needed > room:
        raise UserError(
            f"A prompt of {time} tokens and {steps} steps need room for {needed} tokens, and the attention cache has "
            f"room for {room} more; make the state with a larger capacity, or ask for less."
        )


def _pieces(
    model: Any, params: Any, state: Any, prompt: Tokens, steps: int, how: Choice, key: PRNGKeyArray
) -> Iterator[tuple[Int[np.ndarray, "B n"], Any]]:
    at = 0
    for size in READS:
        while prompt.shape[1] - at >= size:
            logits, state = _read(model, params, prompt[:, at : at + size], state)
            at += size
    last, finite = _next(logits, key, 0, how)
    yield _checked(last[:, None], finite, 0), state
    for start in range(1, steps, PIECE):
        count = min(PIECE, steps - start)
        tokens, finite, state = _write(model, params, state, last, key, start, count, how)
        last = tokens[:, count - 1]
        yield _checked(tokens[:, :count], finite, start), state


def _learning_pieces(
    model: Any, params: Any, state: Any, prompt: Tokens, steps: int, how: Choice, key: PRNGKeyArray
) -> Iterator[tuple[Int[np.ndarray, "B n"], Any]]:
    """As ``_pieces``, and levels are written whenever a chunk is over: inside it the weights stand still."""
    logits, state = context.expect(model, params, state, prompt)
    last, finite = _next(logits, key, 0, how)
    yield _checked(last[:, None], finite, 0), state
    start, chunk = 1, plan_of(model, trained=False).chunk
    while start < steps:
        count = min(PIECE, steps - start, chunk - state.tokens.shape[1])
        if count:
            tokens, finite, blocks = _write(model, params, state.blocks, last, key, start, count, how)
            tokens = tokens[:, :count]
            state = state.within_chunk(jnp.concatenate([last[:, None], tokens[:, :-1]], axis=1), blocks)
        else:  # the last token completes the chunk before it, and is itself read with what that chunk taught
            logits, state = context.expect(model, params, state, last[:, None])
            chosen, finite = _next(logits, key, start, how)
            tokens, count = chosen[:, None], 1
        last = tokens[:, -1]
        yield _checked(tokens, finite, start), state
        start += count


def _checked(tokens: Array, finite: Bool[Array, ""], start: int) -> Int[np.ndarray, "B n"]:
    """The tokens on the host, if the model meant anything by them."""
    if not finite:
        raise UserError(
            f"The model's logits are not finite at or soon after written token {start}: its parameters or its state "
            "are damaged (a diverged training run, or a state that was carried after NaN)."
        )
    return np.asarray(tokens)


@functools.partial(jax.jit, static_argnames="model")
def _read(model: Any, params: Any, tokens: Tokens, state: Any) -> tuple[Float[Array, "B vocab"], Any]:
    """Logits after the last of ``tokens``."""
    logits, state = model.apply({"params": params}, tokens, state)
    return logits[:, -1], state


@jax.jit
def _next(
    logits: Float[Array, "B vocab"], key: PRNGKeyArray, index: Any, how: Choice
) -> tuple[Int[Array, " B"], Bool[Array, ""]]:
    """Written token number ``index``, and whether the logits are finite."""
    return _choose(logits, jax.random.fold_in(key, index), how), jnp.isfinite(logits).all()


@functools.partial(jax.jit, static_argnames="model")
def _write(
    model: Any, params: Any, state: Any, last: Int[Array, " B"], key: PRNGKeyArray, start: Any, count: Any, how: Choice
) -> tuple[Tokens, Bool[Array, ""], Any]:
    """``count`` times: read the last token, choose the next; step i of the whole text uses the i-th key.

    Returns ``[B, PIECE]`` tokens, of which ``count`` are written, whether all logits were finite, and the state.
    """

    def step(i, carry):
        tokens, last, finite, state = carry
        logits, state = _read(model, params, last[:, None], state)
        last = _choose(logits, jax.random.fold_in(key, start + i), how)
        return tokens.at[:, i].set(last), last, finite & jnp.isfinite(logits).all(), state

    tokens = jnp.zeros((last.shape[0], PIECE), jnp.int32)
    tokens, _, finite, state = jax.lax.fori_loop(0, count, step, (tokens, last, jnp.array(True), state))
    return tokens, finite, state


def _choose(logits: Float[Array, "B vocab"], key: PRNGKeyArray, how: Choice) -> Int[Array, " B"]:
    tokens = jax.lax.switch(how.mode, (_likeliest, _draw, _draw_among_few), logits, key, how)
    return tokens.astype(jnp.int32)


def _likeliest(logits: Float[Array, "B vocab"], key: PRNGKeyArray, how: Choice) -> Int[Array, " B"]:
    return jnp.argmax(logits, axis=-1)


def _draw(logits: Float[Array, "B vocab"], key: PRNGKeyArray, how: Choice) -> Int[Array, " B"]:
    return jax.random.categorical(key, logits / how.temperature)


def _draw_among_few(logits: Float[Array, "B vocab"], key: PRNGKeyArray, how: Choice) -> Int[Array, " B"]:
    """Draw a rank, not a token, so that ties never let more than ``top_k`` tokens through."""
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / how.temperature
    ranked = jnp.where(jnp.arange(ranked.shape[-1])[None] < how.top_k, ranked, -jnp.inf)
    chances = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(chances, axis=-1) - chances
    rank = jax.random.categorical(key, jnp.where(before < how.top_p, ranked, -jnp.inf))
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]
