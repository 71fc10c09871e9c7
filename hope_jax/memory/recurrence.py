"""The one recurrence under every memory of this library (SPEC 1: Eq. 5, 64, 65, 88, 92-93 are settings of it).

    S_t = beta_t S_{t-1} + w_t k_t^T
    M_t = M_{t-1} (alpha_t I - a_t k_t k_t^T) + S_t

``gated_delta`` evaluates it for one head (``vmap`` for the rest) in two interchangeable forms:
``sequential`` is the definition, a ``lax.scan`` over tokens; ``chunked`` is exact and turns every
block of tokens into a handful of matrix products (``block.py``). ``rule.py`` says which (alpha, a, beta, w) make
which model.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hope_jax.errors import UserError
from hope_jax.memory.block import Read, advance, coefficients, recall
from hope_jax.memory.products import flip, gram
from hope_jax.types import Array, Float

Impl = Literal["chunked", "sequential"]


class Recurrence(NamedTuple):
    """What ``gated_delta`` returns: reads [T,V] (zeros wide when there were no queries), final memory and momentum."""

    reads: Float[Array, "T V"] | None
    memory: Float[Array, "V K"]
    momentum: Float[Array, "V K"] | None


class _Tokens(NamedTuple):
    """Everything that arrives per token; every leaf is [T, ...] and an absent input is None."""

    keys: Float[Array, "T K"]
    writes: Float[Array, "T V"]
    queries: Float[Array, "T K"] | None
    retention: Float[Array, " T"]
    erase: Float[Array, " T"] | None
    momentum_decay: Float[Array, " T"] | None
    active: Float[Array, " T"] | None


def gated_delta(
    memory: Float[Array, "V K"],
    keys: Float[Array, "T K"],
    writes: Float[Array, "T V"],
    queries: Float[Array, "T K"] | None,
    *,
    retention: Float[Array, " T"],
    erase: Float[Array, " T"] | None,
    momentum: Float[Array, "V K"] | None = None,
    momentum_decay: Float[Array, " T"] | None = None,
    base: Float[Array, "V K"] | None = None,
    active: Float[Array, " T"] | None = None,
    read: Read = "before",
    impl: Impl = "chunked",
    block: int = 32,
) -> Recurrence:
    """Run the gated delta recurrence over T tokens of one head.

    Args:
      memory: M_0, the weights before the first token. Here and in the result memories are the M of the equations;
        weights of rules and models are kernels, their transposes.
      keys: k_t; need not be unit.
      writes: w_t, the vector written against the key.
      queries: q_t, or None when nobody reads (the final state only).
      retention: alpha_t in [0, 1]; 1 keeps everything.
      erase: a_t >= 0, the strength of ``-a k k^T``; None means 0 and skips the triangular solve.
      momentum: S_0; None (with ``momentum_decay`` None) means no momentum, S_t = w_t k_t^T.
      momentum_decay: beta_t in [0, 1].
      base: weights B that are read and erased together with M but never decay: the recurrence runs on
        the deviation, reads return (B + M) q and the erase removes a (B + M) k k^T (SPEC 2.4 ``retain_to``).
      active: 1 for real tokens, 0 for padding, which leaves memory and momentum untouched.
      read: "before": y_t = M_{t-1} q_t; "after": y_t = M_t q_t.
      impl: "chunked" (exact, matrix products) or "sequential" (the definition).
      block: tokens per block of the chunked form; any positive number.

    Returns:
      ``Recurrence(reads, memory, momentum)`` in at least float32.

    Raises:
      UserError: momentum without its decay or the reverse, gates that are not one number per token, an unknown
        ``read`` or ``impl``, or block < 1.
    """
    _check(momentum, momentum_decay, read, impl, block)
    gates = dict(retention=retention, erase=erase, momentum_decay=momentum_decay, active=active)
    for name, gate in gates.items():
        if gate is not None and jnp.shape(gate) != keys.shape[:1]:
            raise UserError(f"{name} has shape {jnp.shape(gate)}; expected one number per token, {keys.shape[:1]}")
    dtype = jnp.promote_types(memory.dtype, jnp.float32)
    if active is not None:
        active = lax.stop_gradient(active)
    tokens = _Tokens(keys, writes, queries, retention, erase, momentum_decay, active)
    tokens = jax.tree.map(lambda x: x.astype(dtype), tokens)
    memory, momentum, base = jax.tree.map(lambda x: x.astype(dtype), (memory, momentum, base))
    run = _sequential if impl == "sequential" else _chunked
    return run(memory, momentum, base, _masked(tokens), read, block)


def _check(momentum: Array | None, momentum_decay: Array | None, read: str, impl: str, block: int) -> None:
    if (momentum is None) != (momentum_decay is None):
        missing = "momentum" if momentum is None else "momentum_decay"
        raise UserError(f"{missing} is None but the other is given; pass both, or neither for no momentum")
    if read not in ("before", "after"):
        raise UserError(f"read is {read!r}; expected 'before' or 'after'")
    if impl not in ("chunked", "sequential"):
        raise UserError(f"impl is {impl!r}; expected 'chunked' or 'sequential'")
    if block < 1:
        raise UserError(f"block is {block}; expected at least 1 token")


def _masked(tokens: _Tokens) -> _Tokens:
    """Neutral gates where a token is not active; the gain on S is what ``active`` itself does."""
    on = tokens.active
    if on is None:
        return tokens
    decay = None if tokens.momentum_decay is None else on * tokens.momentum_decay + (1 - on)
    return tokens._replace(
        writes=on[:, None] * tokens.writes,
        retention=on * tokens.retention + (1 - on),
        erase=None if tokens.erase is None else on * tokens.erase,
        momentum_decay=decay,
    )


# ---------------------------------------------------------------- the definition


def _sequential(memory, momentum, base, tokens: _Tokens, read: Read, block: int) -> Recurrence:
    del block
    fixed = 0.0 if base is None else base

    def step(carry, token: _Tokens):
        before, surprise = carry
        write = jnp.outer(token.writes, token.keys)
        if surprise is not None:
            write = surprise = token.momentum_decay * surprise + write
        after = token.retention * before + (write if token.active is None else token.active * write)
        if token.erase is not None:
            after -= token.erase * jnp.outer((fixed + before) @ token.keys, token.keys)
        seen = before if read == "before" else after
        return (after, surprise), None if token.queries is None else (fixed + seen) @ token.queries

    (memory, momentum), reads = lax.scan(step, (memory, momentum), tokens)
    return Recurrence(reads, memory, momentum)


# ---------------------------------------------------------------- the exact block form


def _chunked(memory, momentum, base, tokens: _Tokens, read: Read, block: int) -> Recurrence:
    state, base = jax.tree.map(flip, ((memory, momentum), base))  # blocks work on kernels
    step, length = functools.partial(_block, base, read), tokens.keys.shape[0]
    if length <= block:
        state, reads = step(state, tokens)
    else:
        blocks = jax.tree.map(lambda x: _split(x, block), _padded(tokens, -length % block, length))
        state, reads = lax.scan(jax.checkpoint(step), state, blocks)
        reads = None if reads is None else reads.reshape(-1, reads.shape[-1])[:length]
    return Recurrence(reads, *jax.tree.map(flip, state))


def _padded(tokens: _Tokens, extra: int, length: int) -> _Tokens:
    """``extra`` inactive tokens at the end: zero keys and writes, gates that keep everything."""
    if not extra:
        return tokens
    active = jnp.ones(length, tokens.keys.dtype) if tokens.active is None else tokens.active
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1)), tokens)
    return _masked(padded._replace(active=jnp.pad(active, (0, extra))))


def _split(x: Array, block: int) -> Array:
    return x.reshape(-1, block, *x.shape[1:])


def _block(base, read: Read, state, tokens: _Tokens):
    memory, momentum = state
    terms = coefficients(tokens.retention, tokens.momentum_decay, tokens.active)
    written = advance(terms, memory, momentum, base, tokens.keys, gram(tokens.keys), tokens.writes, tokens.erase)
    reads = None
    if tokens.queries is not None:
        writes = (tokens.keys, tokens.writes, written.erased)
        reads = recall(memory, momentum, base, *writes, tokens.queries, terms, read)
    return (written.memory, written.momentum), reads
