"""How ``generate.py`` chooses the next token from logits: the settings, checked in the precision of their use."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.errors import UserError, whole
from hope_jax.types import Array, Float, Int, PRNGKeyArray, Scalar

SMALLEST = float(np.finfo(np.float32).tiny)
"""Below it float32 loses precision, and compiled programs take a number for 0."""


class Choice(NamedTuple):
    """How a token is chosen. ``mode``: 0 the likeliest, 1 at random, 2 at random among the likeliest few."""

    mode: Int[Array, ""]
    temperature: Scalar
    top_k: Int[Array, ""]
    top_p: Scalar


def choice(vocab: int, temperature: Any, top_k: Any = None, top_p: Any = None) -> Choice:
    """The settings as arrays: ``temperature`` at least 0, ``top_k`` in 1 .. ``vocab``, ``top_p`` in (0, 1].

    Raises UserError where one of them is out of range, or of another type.
    """
    heat = _real(temperature)
    if not 0 <= heat < np.inf:
        raise UserError(f"temperature is {temperature!r}; give 0 for the likeliest token, or a positive number.")
    if top_k is not None and not 1 <= whole("top_k", top_k) <= vocab:
        raise UserError(f"top_k is {top_k}; give 1 to {vocab} (the vocabulary), or None for all tokens.")
    share = 1.0 if top_p is None else _real(top_p)
    if not SMALLEST <= share <= 1:
        raise UserError(f"top_p is {top_p!r}; give a probability above 0 and at most 1, or None for all tokens.")
    mode = 0 if heat < SMALLEST else 1 if top_k is None and top_p is None else 2
    few = vocab if top_k is None else top_k
    limit = np.inf if share == 1 else share  # the sum of all probabilities can exceed 1 by rounding: 1 is no limit
    return Choice(jnp.int32(mode), jnp.float32(max(heat, SMALLEST)), jnp.int32(few), jnp.float32(limit))


def check_key(key: Any) -> None:
    """Raise UserError unless ``key`` is one random key."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    if not typed and not (dtype == jnp.uint32 and shape == (2,)):
        kind = type(key).__name__
        raise UserError(f"key is a {kind} of shape {shape}; give one random key, such as jax.random.key(0).")


def choose(logits: Float[Array, "B vocab"], key: PRNGKeyArray, how: Choice) -> Int[Array, " B"]:
    """A token for each row of logits."""
    tokens = jax.lax.switch(how.mode, (_likeliest, _draw, _draw_among_few), logits, key, how)
    return tokens.astype(jnp.int32)


def _real(value: Any) -> float:
    """The number as float32 has it; NaN if it is none."""
    try:
        number = float("nan" if isinstance(value, bool | str | bytes) else value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    with np.errstate(over="ignore", under="ignore"):
        return float(np.float32(number))


def _likeliest(logits: Float[Array, "B vocab"], key: PRNGKeyArray, how: Choice) -> Int[Array, " B"]:
    return jnp.argmax(logits, axis=-1)


def _draw(logits: Float[Array, "B vocab"], key: PRNGKeyArray, how: Choice) -> Int[Array, " B"]:
    return jax.random.categorical(key, _cooled(logits, how))


def _cooled(logits: Float[Array, "B vocab"], how: Choice) -> Float[Array, "B vocab"]:
    """``logits / temperature`` up to a constant per row: the largest is 0, so that no temperature makes it infinite."""
    return (logits - jnp.max(logits, axis=-1, keepdims=True)) / how.temperature


def _draw_among_few(logits: Float[Array, "B vocab"], key: PRNGKeyArray, how: Choice) -> Int[Array, " B"]:
    """Draw a rank, not a token, so that ties never let more than ``top_k`` tokens through."""
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(_cooled(logits, how), order, axis=-1)
    ranked = jnp.where(jnp.arange(ranked.shape[-1])[None] < how.top_k, ranked, -jnp.inf)
    chances = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(chances, axis=-1) - chances
    rank = jax.random.categorical(key, jnp.where(before < how.top_p, ranked, -jnp.inf))
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]
