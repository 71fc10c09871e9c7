"""A memory reads and writes a sequence: anchors on the grid of positions, each period one call of the recurrence.

All functions are for one head of one sequence. ``self_modifying.py`` does the same for many memories at once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.levels import Active, Due, scan_levels
from hope_jax.memory.architectures import Weights
from hope_jax.memory.chunked import Linear, Lookup, Tokens
from hope_jax.memory.decays import Shared
from hope_jax.memory.kernels import Impl, Products, products_of
from hope_jax.memory.recurrence import evaluate
from hope_jax.memory.rule import Fast, Gates, Rule, layer_write, layer_writes
from hope_jax.types import Array, Count, Float, Int


def scan(
    rule: Rule,
    initial: Weights,
    fast: Fast,
    keys: Float[Array, "T K"],
    values: Float[Array, "T V"],
    queries: Float[Array, "T K"],
    gates: Gates,
    position: Int[Array, ""] | np.ndarray,
    impl: Impl = "auto",
    count: Count = None,
) -> tuple[Fast, Float[Array, "T V"]]:
    """Read and write one memory over T tokens; returns the fast weights after them, and the reads.

    ``initial`` are the weights M_0 the sequence started from (used by ``retain_to="init"``), ``position`` the tokens
    before this call, or since an anchor was last refreshed. Any cut of the T tokens into calls gives the same result.
    ``impl`` is that of ``gated_delta``.

    Raises:
      UserError: an unknown ``impl``, or gates without ``momentum_decay`` for a rule with momentum, or the reverse.
    """
    tokens = (keys, values, queries, gates)
    if rule.gradient_at != "anchor":
        active = None if count is None else (jnp.arange(len(keys)) < count).astype(jnp.float32)
        return _write(rule, initial, impl, fast, tokens, active)

    def segment(fast: Fast, tokens, active: Active, due: tuple[Due, ...]):
        return _write(rule, initial, impl, _refreshed(fast, due[0]), tokens, active)

    return scan_levels(segment, fast, tokens, position=position, periods=(rule.period,), count=count)


def _refreshed(fast: Fast, due: Due) -> Fast:
    """The anchor moved to the running weights where the level is due."""
    if due is True:
        return fast._replace(anchor=fast.running)
    return fast._replace(anchor=jax.tree.map(lambda old, new: jnp.where(due, new, old), fast.anchor, fast.running))


def _write(
    rule: Rule, initial: Weights, impl: Impl, fast: Fast, given: tuple[Array, Array, Array, Gates], active: Active
) -> tuple[Fast, Float[Array, "T V"]]:
    """Write and read inside one period (any length when there is no anchor)."""
    keys, values, queries, gates = given
    products, gates = products_of(impl), idle(gates, active)
    if rule.gradient_at == "anchor":
        at_keys = products.matmul(keys, fast.anchor[0])
        at_values = products.matmul(values, fast.anchor[0]) if rule.self_values else None
        writes = layer_writes(rule, products, fast.anchor[1:], (keys, values), (at_keys, at_values), gates)
    else:
        writes = [layer_write(rule, 0, keys, -values, gates)]
    shared = Shared(gates.retention, gates.momentum_decay, active)
    reader = functools.partial(read_memory, rule, products, fast.anchor)
    tokens = Tokens(writes, shared, queries)
    ends, reads = evaluate(linear_memories(rule, fast, initial), tokens, reader, rule.read_time, impl, block=32)
    return updated(fast, ends), reads


def idle(gates: Gates, active: Active) -> Gates:
    """Gates that write nothing where a token is not active (``evaluate`` sees to what is retained)."""
    return gates if active is None else gates._replace(rate=active * gates.rate)


def linear_memories(rule: Rule, fast: Fast, initial: Weights) -> list[Linear]:
    """The layers as the recurrence sees them: with ``retain_to="init"``, as deviations from the initial weights."""
    nothing = (None,) * len(fast.running)
    bases = initial if rule.retain_to == "init" else nothing
    layers = zip(fast.running, fast.momentum or nothing, bases, strict=True)
    return [Linear(memory if base is None else memory - base, momentum, base) for memory, momentum, base in layers]


def updated(fast: Fast, ends: list[Linear]) -> Fast:
    """The fast weights, with ``ends`` in the place of the running weights and momenta."""
    running = tuple(end.memory if end.base is None else end.base + end.memory for end in ends)
    return Fast(fast.anchor, running, tuple(end.momentum for end in ends if end.momentum is not None))


def read_memory(rule: Rule, products: Products, anchor: Weights, lookup: Lookup, queries: Array) -> Array:
    """M(q) of every token, layer by layer."""
    architecture = rule.architecture
    if rule.read == "anchor":
        return architecture.apply(anchor, queries, products)
    x = lookup(0, queries)
    for layer in range(1, architecture.layers):
        x = lookup(layer, architecture.activation(x))
    return x + queries if architecture.residual else x
