"""The one recurrence under every memory of this library (SPEC 1: Eq. 5, 64, 65, 88, 92-93 are settings of it).

    S_t = beta_t S_{t-1} + w_t k_t^T
    M_t = M_{t-1} (alpha_t I - a_t k_t k_t^T) + S_t

``gated_delta`` evaluates it for one head, ``evaluate`` for all linear memories that share their tokens' alpha and beta,
in two forms: ``sequential`` is the definition, a ``lax.scan`` over tokens; the other one is exact and turns every block
of tokens into a handful of matrix products (``chunked.py``). ``rule.py``: which (alpha, a, beta, w) make which model.
Where retention differs between key channels, ``diagonal.py`` has both forms.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hope_jax.errors import UserError, check_word, whole
from hope_jax.memory.chunked import Linear, Lookup, Read, Tokens, Write, chunk, first_box
from hope_jax.memory.decays import ReadTime, Shared
from hope_jax.memory.diagonal import Erase, check_diagonal, diagonal_delta
from hope_jax.memory.kernels import Impl, chunk_loop, inside_kernel, products_of
from hope_jax.memory.products import transpose
from hope_jax.types import Array, Float


class Recurrence(NamedTuple):
    """What ``gated_delta`` returns: reads [T,V] (None when there were no queries), final memory and momentum."""

    reads: Float[Array, "T V"] | None
    memory: Float[Array, "V K"]
    momentum: Float[Array, "V K"] | None


def gated_delta(
    memory: Float[Array, "V K"],
    keys: Float[Array, "T K"],
    writes: Float[Array, "T V"],
    queries: Float[Array, "T K"] | None,
    *,
    retention: Float[Array, " T"] | Float[Array, "T K"],
    erase: Float[Array, " T"] | Erase | None,
    momentum: Float[Array, "V K"] | None = None,
    momentum_decay: Float[Array, " T"] | None = None,
    base: Float[Array, "V K"] | None = None,
    active: Float[Array, " T"] | None = None,
    read: ReadTime = "before",
    impl: Impl = "auto",
    block: int = 32,
) -> Recurrence:
    """Run the gated delta recurrence over T tokens of one head (``vmap`` for the rest).

    Args:
      memory: M_0, the weights before the first token. Here and in the result memories are the M of the equations;
        everywhere else in the library they are kernels, the transposes.
      keys, writes: k_t, which need not be unit, and w_t, the vector written against it.
      queries: q_t, or None for the final state alone.
      retention: alpha_t in [0, 1]; 1 keeps everything. [T,K]: a number for every key channel, diag(alpha_t); then
        there is neither momentum nor base.
      erase: a_t >= 0, the strength of ``-a k k^T``; None means 0 and skips the triangular solve. With a retention
        [T,K] also ``Erase(queries, keys)``, two vectors b_t and c_t for ``-b c^T``.
      momentum: S_0; None (with ``momentum_decay`` None) means no momentum, S_t = w_t k_t^T.
      momentum_decay: beta_t in [0, 1].
      base: weights B that are read and erased together with M but never decay: reads return (B + M) q and the erase
        removes a (B + M) k k^T (SPEC 2.4 ``retain_to``).
      active: 1 for real tokens, 0 for padding, which leaves memory and momentum untouched.
      read: "before": y_t = M_{t-1} q_t; "after": y_t = M_t q_t.
      impl: "auto", "chunked", "sequential", "pallas" or another word of ``kernels``.
      block: tokens per block of the chunked form; any positive number.

    Returns:
      ``Recurrence(reads, memory, momentum)`` in at least float32.

    Raises:
      UserError: momentum without its decay or the reverse, momentum or base with a retention [T,K], an ``Erase``
        without it, gates that are not one number per token, an unknown ``read`` or ``impl``, or block < 1.
    """
    gates = dict(retention=retention, erase=erase, momentum_decay=momentum_decay, active=active)
    _check(keys, gates, momentum, base, read, block)
    if jnp.ndim(retention) == 2 or isinstance(erase, Erase):
        given = (memory, keys, writes, queries, retention, erase, active)
        return Recurrence(*diagonal_delta(*given, read, impl, block), None)
    if active is not None:
        active = lax.stop_gradient(active)
        writes, erase = active[:, None] * writes, None if erase is None else active * erase
    linear = jax.tree.map(transpose, Linear(memory, momentum, base))
    tokens = Tokens([Write(keys, writes, erase)], Shared(retention, momentum_decay, active), queries)
    dtype = jnp.promote_types(memory.dtype, jnp.float32)
    linear, tokens = jax.tree.map(lambda x: x.astype(dtype), (linear, tokens))

    (end,), reads = evaluate([linear], tokens, _look_up, read, impl, block)
    return Recurrence(reads, transpose(end.memory), None if end.momentum is None else transpose(end.momentum))


def _look_up(lookup: Lookup, queries: Array | None) -> Array | None:
    return None if queries is None else lookup(0, queries)


def _check(keys: Array, gates: dict[str, Any], momentum: Any, base: Any, read: str, block: int) -> None:
    if jnp.ndim(gates["retention"]) == 2 or isinstance(gates["erase"], Erase):
        check_diagonal(keys, gates, momentum, base)
        gates = dict(momentum_decay=None, active=gates["active"])
    if (momentum is None) != (gates["momentum_decay"] is None):
        missing = "momentum" if momentum is None else "momentum_decay"
        raise UserError(f"{missing} is None but the other is given; pass both, or neither for no momentum")
    check_word("read", read, ReadTime)
    whole("block", block, 1, "tokens")
    for name, gate in gates.items():
        if gate is not None and jnp.shape(gate) != keys.shape[:1]:
            raise UserError(f"{name} has shape {jnp.shape(gate)}; expected one number per token, {keys.shape[:1]}")


def evaluate(
    linears: list[Linear], tokens: Tokens, read: Read, time: ReadTime, impl: Impl, block: int | None = None
) -> tuple[list[Linear], Any]:
    """Write T tokens into every memory and read them: ``chunked.chunk`` over any number of tokens, or its definition.

    ``block`` is the number of tokens per chunk, None for all of them. Inactive tokens must come with zero writes and
    erases; this function sets their retention.
    """
    tokens = tokens._replace(shared=_idle(tokens.shared))
    if impl == "sequential":
        return _sequential(linears, tokens, read, time)
    return _chunked(impl, block, linears, tokens, read, time)


def _idle(shared: Shared) -> Shared:
    """Retention and decay of 1 where a token is not active; ``active`` keeps S from being added there."""
    on, decay = shared.active, shared.momentum_decay
    if on is None:
        return shared
    return Shared(on * shared.retention + (1 - on), None if decay is None else on * decay + (1 - on), on)


def _sequential(linears: list[Linear], tokens: Tokens, read: Read, time: ReadTime) -> tuple[list[Linear], Any]:
    def step(before: list[Linear], token: Tokens):
        writes, shared, queries = token
        after = [token_step(*one, shared) for one in zip(before, writes, strict=True)]
        seen = before if time == "before" else after

        def lookup(index: int, inputs: Array, at_inputs: Array | None = None) -> Array:
            del at_inputs  # of the memory before all tokens
            return inputs @ _read_weights(first_box(seen[index], writes[index].writes.shape[-1]))

        reads = read(lookup, jax.tree.map(lambda x: x[None], queries))
        return after, jax.tree.map(lambda x: x[0], reads)

    return lax.scan(step, linears, tokens._replace(writes=[_by_token(write) for write in tokens.writes]))


def _by_token(write: Write) -> Write:
    """Tokens on the first axis, which is that of boxes where there are several."""
    erase = None if write.erase is None else jnp.moveaxis(write.erase, -1, 0)
    keys, writes = (jnp.moveaxis(x, -2, 0) for x in (write.keys, write.writes))
    return replace(write, keys=keys, writes=writes, erase=erase, memory_at_keys=None)


def _read_weights(linear: Linear) -> Array:
    return linear.memory if linear.base is None else linear.base + linear.memory


def token_step(linear: Linear, write: Write, shared: Shared) -> Linear:
    """The recurrence itself, at one token: leaves of ``write`` and ``shared`` have no time axis."""
    if linear.memory.ndim == 3:
        return jax.vmap(token_step, in_axes=(0, 0, None))(linear, write, shared)
    added = jnp.outer(write.keys, write.writes)  # the writes of boxes that lie side by side, one after another
    if linear.momentum is not None and shared.momentum_decay is not None:
        added = shared.momentum_decay * linear.momentum + added
    memory = shared.retention * linear.memory + (added if shared.active is None else shared.active * added)
    if write.erase is not None:
        erase = jnp.broadcast_to(write.erase[..., None], write.writes.shape).ravel()
        memory -= jnp.outer(write.keys, erase * (write.keys @ _read_weights(linear)))
    return Linear(memory, None if linear.momentum is None else added, linear.base)


def _chunked(
    impl: Impl, block: int | None, linears: list[Linear], tokens: Tokens, read: Read, time: ReadTime
) -> tuple[list[Linear], Any]:
    def step(linears: list[Linear], tokens: Tokens):
        # Asked for in here: a kernel has other products, and is traced with them.
        return chunk(products_of(inside_kernel(impl)), linears, tokens, read, time)

    length = tokens.shared.retention.shape[0]
    if block is None or length <= block:
        return step(linears, tokens)
    if length % block:
        tokens = _padded(tokens, length, -length % block)
    blocks = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), tokens)
    linears, reads = chunk_loop(impl)(step, linears, blocks)
    return linears, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:length], reads)


def _padded(tokens: Tokens, length: int, extra: int) -> Tokens:
    """``extra`` inactive tokens at the end: zero keys and writes, and everything is retained."""
    shared = tokens.shared
    if shared.active is None:
        tokens = tokens._replace(shared=shared._replace(active=jnp.ones(length, shared.retention.dtype)))
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1)), tokens)
    return padded._replace(shared=_idle(padded.shared))
