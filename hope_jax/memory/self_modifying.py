"""Self-modifying Titans as a pure function of one head of one sequence (SPEC 2; Eq. 83-93).

Six kinds of memory ("boxes") in three groups:

* ``memory``       what is read: y_t = M_memory,t-1(q_t) (a single box)                                 Eq. 83, 94
* ``projections``  [k, v, q as configured]  k_t = unit(M_k(x_k,t)), v_t, q_t, read at their anchors      Eq. 85-86
* ``gates``        [eta, alpha]  the inner learning rate and the retention of every box                  Eq. 85-86

All of them are written at every token with the same key, rate and retention, each towards the target it generates
itself, M_box(v_t) at its own anchor (Eq. 84, 87), by delta gradient descent with retention (Eq. 88, 90). The whole is
differentiable, writes included. The layer around it: ``nn/mixers/self_modifying.py``.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.errors import UserError
from hope_jax.levels import Active, Due, check_multiples, scan_levels
from hope_jax.memory.architectures import Weights, unit
from hope_jax.memory.chunked import Tokens, Write, apart
from hope_jax.memory.decays import Shared
from hope_jax.memory.kernels import Impl, Products, inside_kernel, kernel_loop, products_of
from hope_jax.memory.packing import Boxes, Stack, pack, stacks_of, unpack, where_due
from hope_jax.memory.recurrence import evaluate
from hope_jax.memory.rule import Fast, Gates, layer_writes
from hope_jax.memory.scan import entered, idle, linear_memories, projected, read_memory, restarted, updated
from hope_jax.types import Array, Count, Float, Int

PROJECTIONS, GATES = 1, 2  # groups of ``Boxes``


class Streams(NamedTuple):
    """The inputs of one head for each token; x, k, v, q have unit norm.

    ``x`` is the input of the gate memories, ``k``, ``v``, ``q`` that of the projection memory of that name, or the
    finished projection where it is static, ``momentum_decay`` is beta_t, None without momentum.
    """

    x: Float[Array, "T K"]
    k: Float[Array, "T K"]
    v: Float[Array, "T K"]
    q: Float[Array, "T K"]
    momentum_decay: Float[Array, " T"] | None


class Tuning(NamedTuple):
    """Learned scalars of one head: log of each group's rate scale and the biases of the two gates."""

    log_rate: Boxes
    rate_bias: Float[Array, ""]
    retention_bias: Float[Array, ""]


class Reading(NamedTuple):
    """What one head returns for every token: y_t, q_t where they are made here, and the gates of the main memory.

    The gates are for inspection: nothing is differentiated through them.
    """

    reads: Float[Array, "T V"]
    queries: Float[Array, "T K"] | None
    gates: Gates


@dataclass(frozen=True)
class SelfModifying:
    """The static part: rules that differ at most in architecture and period, one of which divides the other.

    ``adaptive`` are the names among "k", "v", "q" that are memories, in the order of their boxes. The rate is
    eta = ``rate_max`` * sigmoid(.); without ``retention`` alpha is 1.
    """

    rules: Boxes
    adaptive: tuple[str, ...]
    rate_max: float
    retention: bool

    def __post_init__(self) -> None:
        check_multiples(sorted(self.periods))
        if self.rules.projections.period != self.rules.gates.period:
            raise UserError("the projections and the gates have one period; give their rules the same")
        one, *others = self.rules
        if one.gradient_at != "anchor" or not one.self_values or one.link is not None:
            needs = "gradient_at='anchor', link=None and self_values=True"
            raise UserError(f"the rules of a self-modifying head need {needs}")
        if any(dataclasses.replace(r, architecture=one.architecture, period=one.period) != one for r in others):
            raise UserError("the rules of the memory, projections and gates may differ in architecture and period only")

    @property
    def periods(self) -> tuple[int, int]:
        """Anchor periods of the memory and of the others."""
        return (self.rules.memory.period, self.rules.gates.period)

    @property
    def cycle(self) -> int:
        """Tokens after which the positions of anchors and shards repeat."""
        return max(rule.cycle for rule in self.rules)

    def stacks(self, initial: Boxes) -> tuple[Stack, ...]:
        """How boxes with these initial weights lie in the fast weights."""
        return stacks_of(Boxes(*(rule.architecture for rule in self.rules)), initial)

    def start(self, initial: Boxes) -> Fast:
        """Fast weights at the start of a sequence: every box at its initial weights, packed."""
        return self.rules.memory.start(pack(self.stacks(initial), initial))


def scan(
    spec: SelfModifying,
    initial: Boxes,
    tuning: Tuning,
    fast: Fast,
    streams: Streams,
    position: Int[Array, ""] | np.ndarray,
    impl: Impl = "auto",
    count: Count = None,
) -> tuple[Fast, Reading]:
    """Read T tokens with one head; returns the fast weights after them.

    ``initial`` holds M_box,0 per group, ``fast`` the packed weights (``SelfModifying.start``), ``position`` the tokens
    since all anchors were last refreshed together. Any cut of the T tokens into calls gives the same result. ``impl``
    is that of ``gated_delta``.
    """
    rule = spec.rules.memory
    starts = pack(spec.stacks(initial), initial) if rule.retain_to == "init" or rule.shard is not None else ()
    fast, inside = entered(rule, starts, fast, position, len(streams.x))
    head = _Head(spec, spec.stacks(initial), starts, tuning, inside_kernel(impl))
    run_chunk = functools.partial(_run_chunk, head)
    return scan_levels(
        run_chunk,
        fast,
        streams,
        position=position,
        periods=(*spec.periods, *inside),
        count=count,
        kernel=kernel_loop(impl),
    )


class _Head(NamedTuple):
    """What stays the same while a sequence is read; ``starts`` are the packed initial weights, if they are needed."""

    spec: SelfModifying
    stacks: tuple[Stack, ...]
    starts: Weights
    tuning: Tuning
    impl: Impl


def _run_chunk(head: _Head, fast: Fast, streams: Streams, active: Active, due: tuple[Due, ...]) -> tuple[Fast, Reading]:
    """Tokens inside one period: generate keys, values and gates at the anchors, then write every layer of every box."""
    rule, products = head.spec.rules.memory, products_of(head.impl)
    memory, others, *shards = due
    for begins in shards:  # all boxes at once: keys of a memory that was set back do not fit one that was not
        fast = restarted(rule, head.starts, fast, begins)
    fresh = memory is True and others is True
    anchor = fast.running if fresh else where_due(head.stacks, Boxes(memory, others, others), fast.running, fast.anchor)
    fast = fast._replace(anchor=anchor)
    streams, gates = _generate(head, products, fast.anchor, streams)
    gates = idle(gates, active)
    fast, queries = projected(fast, streams.k, streams.q, head.impl, active)
    # Anchors that were just refreshed are the running weights, so their products with the keys are known.
    write = functools.partial(_write, head, products, fast.anchor, streams, gates, fresh and rule.retain_to != "init")
    writes = [layer for stack in head.stacks for layer in write(stack)]
    main = unpack(head.stacks, fast.anchor)[0] if rule.read == "anchor" else ()
    read, linears = functools.partial(read_memory, rule, products, main), linear_memories(rule, fast, head.starts)
    tokens = Tokens(writes, Shared(gates.retention, gates.momentum_decay, active), queries)
    ends, reads = evaluate(linears, tokens, read, rule.read_time, head.impl)
    made = queries if rule.project_queries or "q" in head.spec.adaptive else None
    return updated(fast, ends), Reading(reads, made, jax.lax.stop_gradient(gates))


def _generate(head: _Head, products: Products, anchor: Weights, streams: Streams) -> tuple[Streams, Gates]:
    """Adaptive projections, rate and retention of every token from their memories' anchors (Eq. 85, SPEC 2.1)."""
    spec, tuning = head.spec, head.tuning
    gates = _apply_group(head, products, anchor, GATES, streams.x)[..., 0]
    rate = spec.rate_max * jax.nn.sigmoid(gates[0] + tuning.rate_bias)
    retention = jax.nn.sigmoid(gates[1] + tuning.retention_bias) if spec.retention else jnp.ones_like(rate)
    if spec.adaptive:
        inputs = jnp.stack([getattr(streams, name) for name in spec.adaptive])
        outputs = unit(_apply_group(head, products, anchor, PROJECTIONS, inputs))
        streams = streams._replace(**dict(zip(spec.adaptive, outputs, strict=True)))
    return streams, Gates(rate, retention, streams.momentum_decay)


def _apply_group(
    head: _Head, products: Products, anchor: Weights, group: int, inputs: Float[Array, "*N C K"]
) -> Float[Array, "N C V"]:
    """Each box of a group applied to its own inputs, or all of them to the same ones."""
    (stack,) = [stack for stack in head.stacks if group in stack.groups]
    count, first, later = stack.of_group(anchor, group)
    finish = functools.partial(stack.architecture.finish, products=products)
    if inputs.ndim == 2:
        return jax.vmap(finish, in_axes=(0, 0, None))(apart(products.matmul(inputs, first), count), later, inputs)
    return jax.vmap(finish)(products.matmul(inputs, apart(first, count)), later, inputs)


def _write(
    head: _Head, products: Products, anchor: Weights, streams: Streams, gates: Gates, fresh: bool, stack: Stack
) -> list[Write]:
    """The writes into each layer of stacked boxes; ``fresh``: the memories are still equal to their anchors."""
    rule, (first, *later) = head.spec.rules[stack.groups[0]], stack.layers(anchor)
    scales = jnp.exp(jnp.stack([head.tuning.log_rate[group] for group in stack.groups]))
    at_keys, at_values = products.matmul(streams.k, first), products.matmul(streams.v, first)

    def of_box(later: Weights, at_keys: Array, at_values: Array, scale: Array) -> list[Write]:
        own, pairs = gates._replace(rate=scale * gates.rate), (streams.k, streams.v)
        return layer_writes(rule, products, later, pairs, (at_keys, at_values), own, fresh)

    keys_of, values_of = (apart(x, len(stack.groups)) for x in (at_keys, at_values))
    write, *others = jax.vmap(of_box)(tuple(later), keys_of, values_of, scales)
    # The first layers have the same keys; boxes of one group have the same rate, and so the same erase.
    known, systems = at_keys if fresh else None, tuple(stack.groups.index(group) for group in stack.groups)
    return [dataclasses.replace(write, keys=streams.k, memory_at_keys=known, systems=systems), *others]
