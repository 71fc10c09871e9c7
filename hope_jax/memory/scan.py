"""A memory reads and writes a sequence: anchors on the grid of positions, each period one call of the recurrence.

All functions are for one head of one sequence. ``self_modifying.py`` does the same for many memories at once.
"""

import functools

import jax
import jax.numpy as jnp

from hope_jax.levels import Due, scan_levels
from hope_jax.memory.architectures import Weights
from hope_jax.memory.chunked import Linear, Lookup, Write
from hope_jax.memory.decays import Shared
from hope_jax.memory.inner_step import layer_write, layer_writes
from hope_jax.memory.kernels import Impl, Products, products_of
from hope_jax.memory.recurrence import evaluate
from hope_jax.memory.rule import Fast, Gates, MemoryState, Rule
from hope_jax.types import Array, Float, Int


def refresh(fast: Fast, due: Due) -> Fast:
    """Move the anchor to the running weights where the level is due."""
    if not fast.anchor:
        return fast
    if due is True:
        return fast._replace(anchor=fast.running)
    return fast._replace(anchor=jax.tree.map(lambda old, new: jnp.where(due, new, old), fast.anchor, fast.running))


def idle(gates: Gates, active: Float[Array, " T"] | None) -> Gates:
    """Gates that write nothing where a token is not active (``evaluate`` sees to what is retained)."""
    return gates if active is None else gates._replace(rate=active * gates.rate)


def scan(
    rule: Rule,
    state: MemoryState,
    keys: Float[Array, "T K"],
    values: Float[Array, "T V"],
    queries: Float[Array, "T K"],
    gates: Gates,
    initial: Weights,
    impl: Impl = "auto",
    count: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "T V"], MemoryState]:
    """Read and write one memory over T tokens, with anchors on the grid of absolute positions.

    ``initial`` are the weights M_0 the sequence started from (used by ``retain_to="init"``). Any cut of the T
    tokens into calls gives the same reads and final state. ``impl`` is that of ``gated_delta``. ``count``: tokens
    that are real, from the first; None: all.
    """
    time, tokens = keys.shape[0], (keys, values, queries, gates)
    position = (state.position + (time if count is None else count)) % rule.period
    if rule.gradient_at != "anchor":
        active = None if count is None else (jnp.arange(time) < count).astype(jnp.float32)
        fast, reads = write(rule, state.fast, tokens, active, initial, impl)
        return reads, MemoryState(fast, position)

    def segment(fast, tokens, active, due):
        return write(rule, refresh(fast, due[0]), tokens, active, initial, impl)

    grid = {"position": state.position, "periods": (rule.period,), "count": count}
    fast, reads = scan_levels(segment, state.fast, tokens, **grid)
    return reads, MemoryState(fast, position)


def write(
    rule: Rule,
    fast: Fast,
    tokens: tuple[Array, Array, Array, Gates],
    active: Float[Array, " T"] | None,
    initial: Weights,
    impl: Impl,
) -> tuple[Fast, Float[Array, "T V"]]:
    """Write (keys, values) and read queries inside one period (any length when there is no anchor).

    ``tokens`` is (keys [T,K], values [T,V], queries [T,K], gates). Returns the new fast weights and the reads.
    """
    keys, values, queries, gates = tokens
    products, gates = products_of(impl), idle(gates, active)
    if rule.gradient_at == "anchor":
        at_keys = products.matmul(keys, fast.anchor[0])
        at_values = products.matmul(values, fast.anchor[0]) if rule.self_values else None
        layers = layer_writes(rule, products, fast.anchor[1:], (keys, values), (at_keys, at_values), gates)
    else:
        layers = [layer_write(rule, 0, keys, -values, gates)]
    writes = [Write(one.keys, one.writes, one.erase) for one in layers]
    shared = Shared(gates.retention, gates.momentum_decay if rule.momentum else None, active)
    reader = functools.partial(read_memory, rule, products, fast.anchor)
    linears = linear_memories(rule, fast, initial)
    ends, reads = evaluate(linears, writes, shared, queries, reader, time=rule.read_time, impl=impl, block=32)
    return updated(fast, ends), reads


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
