"""A memory reads and writes a sequence: anchors on the grid of positions, each period one call of the recurrence.

All functions are for one head of one sequence. ``self_modifying.py`` does the same for many memories at once.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.levels import Active, Due, scan_levels
from hope_jax.memory import linked
from hope_jax.memory.architectures import Weights, unit
from hope_jax.memory.chunked import Linear, Lookup, Tokens
from hope_jax.memory.decays import Shared
from hope_jax.memory.kernels import Impl, Products, inside_kernel, kernel_loop, products_of
from hope_jax.memory.recurrence import evaluate, gated_delta
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
    fast, (reads, _) = read(rule, initial, fast, (keys, values, queries, gates), position, impl, count)
    return fast, reads


def read(
    rule: Rule,
    initial: Weights,
    fast: Fast,
    tokens: tuple[Array, Array, Array, Gates],
    position: Int[Array, ""] | np.ndarray,
    impl: Impl = "auto",
    count: Count = None,
) -> tuple[Fast, tuple[Float[Array, "T V"], Float[Array, "T K"] | None]]:
    """``scan`` of keys, values, queries and gates; also returns the queries if the rule changed them, else None."""
    anchored, length = rule.gradient_at == "anchor", len(tokens[0])
    fast, inside = entered(rule, initial, fast, position, length)
    if not anchored and not inside:
        active = None if count is None else (jnp.arange(length) < count).astype(jnp.float32)
        return _write(rule, initial, impl, fast, tokens, active)
    period, inner = rule.period if anchored else math.gcd(rule.cycle, 32), inside_kernel(impl)

    def run_chunk(fast: Fast, tokens, active: Active, due: tuple[Due, ...]):
        for begins in due[1:]:
            fast = restarted(rule, initial, fast, begins)
        return _write(rule, initial, inner, refreshed(rule, fast, due[0]) if anchored else fast, tokens, active)

    return scan_levels(
        run_chunk, fast, tokens, position=position, periods=(period, *inside), count=count, kernel=kernel_loop(impl)
    )


def entered(
    rule: Rule, initial: Weights, fast: Fast, position: Int[Array, ""] | np.ndarray, length: int
) -> tuple[Fast, tuple[int, ...]]:
    """The fast weights before the first of ``length`` tokens, and the period of the shards, if one may begin later.

    Tokens that are known to be in one shard, from its start, are read as if there were no shards.
    """
    if rule.shard is None:
        return fast, ()
    if isinstance(position, np.ndarray) and position % rule.shard == 0 and length <= rule.shard:
        return rule.start(initial), ()
    return fast, (rule.shard,)


def restarted(rule: Rule, initial: Weights, fast: Fast, due: Due) -> Fast:
    """Everything set back to its start where a shard begins."""
    return jax.tree.map(lambda now, start: jnp.where(due, start, now), fast, rule.start(initial))


def refreshed(rule: Rule, fast: Fast, due: Due) -> Fast:
    """The anchor moved to the running weights where the level is due."""
    now = rule.acting(fast.running)
    if due is True:
        return fast._replace(anchor=now)
    return fast._replace(anchor=jax.tree.map(lambda old, new: jnp.where(due, new, old), fast.anchor, now))


def _write(
    rule: Rule, initial: Weights, impl: Impl, fast: Fast, given: tuple[Array, Array, Array, Gates], active: Active
) -> tuple[Fast, tuple[Float[Array, "T V"], Float[Array, "T K"] | None]]:
    """Write and read inside one period (any length when there is no anchor)."""
    keys, values, queries, gates = given
    products, gates = products_of(impl), idle(gates, active)
    fast, queries = projected(fast, keys, queries, impl, active)
    if rule.gradient_at == "anchor":
        at_keys = products.matmul(keys, fast.anchor[0])
        at_values = products.matmul(values, fast.anchor[0]) if rule.self_values else None
        writes = layer_writes(rule, products, fast.anchor[1:], (keys, values), (at_keys, at_values), gates)
    else:
        stored = (values, keys) if rule.transposed else (keys, values)
        writes = [layer_write(rule, 0, stored[0], -stored[1], gates)]
    tokens = Tokens(writes, Shared(gates.retention, gates.momentum_decay, active), queries)
    linears, reader = linear_memories(rule, fast, initial), functools.partial(read_memory, rule, products, fast.anchor)
    if rule.transposed:
        reader = functools.partial(read_transposed, fast.running[0])
    if rule.link is not None and rule.read != "anchor":
        ends, reads = linked.evaluate(rule, linears, tokens, impl)
    else:
        ends, reads = evaluate(linears, tokens, reader, rule.read_time, impl, block=32)
    return updated(fast, ends), (reads, queries if rule.project_queries else None)


def projected(
    fast: Fast, keys: Float[Array, "C K"], queries: Float[Array, "C K"], impl: Impl, active: Active
) -> tuple[Fast, Float[Array, "C K"]]:
    """The queries, projected to the span of the keys so far, with norm 1; unchanged where no span is kept."""
    if fast.span is None:
        return fast, queries
    keys, ones = unit(keys), jnp.ones(len(keys), keys.dtype)
    gates: dict[str, Any] = dict(retention=ones, erase=None, active=active)
    found: Any = gated_delta(fast.span, keys, keys, queries, **gates, read="after", impl=impl)
    return fast._replace(span=found.memory), unit(found.reads)


def idle(gates: Gates, active: Active) -> Gates:
    """Gates that write nothing where a token is not active (``evaluate`` sets their retention)."""
    return gates if active is None else gates._replace(rate=active * gates.rate)


def linear_memories(rule: Rule, fast: Fast, initial: Weights) -> list[Linear]:
    """The layers as the recurrence sees them: with ``retain_to="init"``, as deviations from the initial weights."""
    nothing = (None,) * len(fast.running)
    bases = initial if rule.retain_to == "init" else nothing
    layers = zip(fast.running, fast.momentum or nothing, bases, strict=True)
    return [Linear(memory if base is None else memory - base, momentum, base) for memory, momentum, base in layers]


def updated(fast: Fast, ends: list[Linear]) -> Fast:
    """The fast weights with ``ends`` as running weights and momenta."""
    running = tuple(end.memory if end.base is None else end.base + end.memory for end in ends)
    momentum = tuple(end.momentum for end in ends if end.momentum is not None)
    return fast._replace(running=running, momentum=momentum)


def read_memory(rule: Rule, products: Products, anchor: Weights, lookup: Lookup, queries: Array) -> Array:
    """M(q) of every token, layer by layer."""
    architecture = rule.architecture
    if rule.read == "anchor":
        return architecture.apply(anchor, queries, products)
    x = lookup(0, queries)
    for layer in range(1, architecture.layers):
        x = lookup(layer, architecture.activation(x))
    return architecture.answer(x, queries)


def read_transposed(weights: Float[Array, "V K"], lookup: Lookup, queries: Float[Array, "C K"]) -> Array:
    """The transpose of the memory applied to every query: the derivative of a lookup by its input."""
    inputs = jnp.zeros((len(queries), len(weights)), weights.dtype)
    output, back = jax.vjp(functools.partial(lookup, 0), inputs)
    return back(queries.astype(output.dtype))[0]
