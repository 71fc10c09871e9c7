"""Self-modifying Titans as a pure function of one head of one sequence (SPEC 2; Eq. 83-93).

Six kinds of memory ("boxes") in three groups; boxes of one group are stacked on axis N:

* ``memory``       what is read: y_t = M_memory,t-1(q_t) (a single box, no axis N)                      Eq. 83, 94
* ``projections``  [k, v, q as configured]  k_t = unit(M_k(x_k,t)), v_t, q_t, read at their anchors      Eq. 85-86
* ``gates``        [eta, alpha]  the inner learning rate and the retention of every box                  Eq. 85-86

All of them are written at every token with the same key, rate and retention, each towards the target it generates
itself, M_box(v_t) at its own anchor (Eq. 84, 87), by delta gradient descent with retention (Eq. 88, 90). The whole is
differentiable, writes included: nothing is under a stop-gradient. ``nn/self_modifying.py`` is the layer around it.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.errors import UserError
from hope_jax.levels import Active, Due, check_periods, scan_levels
from hope_jax.memory.architectures import Weights, unit
from hope_jax.memory.block import Coefficients, Written, coefficients, recall
from hope_jax.memory.products import nt, split
from hope_jax.memory.rule import Fast, Gates, LayerWrite, finish, next_input, writes_from
from hope_jax.memory.side_by_side import (
    Layer,
    Stack,
    advance_all,
    apart,
    as_one,
    first_box,
    join,
    parts,
    per_box,
    stacks_of,
)
from hope_jax.types import Array, Float, Int


class Boxes(NamedTuple):
    """One value per group: rules, initial weights, fast weights or log rate scales."""

    memory: Any
    projections: Any
    gates: Any


class Streams(NamedTuple):
    """What arrives per token of one head; all of unit norm.

    Attributes:
      x: input of the gate memories.
      k, v, q: input of the projection memory of that name, or the finished projection where it is static.
      momentum_decay: beta_t, or None without momentum.
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


@dataclass(frozen=True)
class SelfModifying:
    """The static part: one rule per group, which projections are memories, the bound of the rate.

    Attributes:
      rules: ``Boxes`` of ``Rule`` that differ at most in architecture and period; one period divides the other.
      adaptive: names among "k", "v", "q" that are memories, in the order of the projections' axis N.
      rate_max: eta = rate_max * sigmoid(.); 0 switches every write off.
      retention: False sets alpha = 1.
    """

    rules: Boxes
    adaptive: tuple[str, ...]
    rate_max: float
    retention: bool

    def __post_init__(self) -> None:
        check_periods(self.periods)
        if self.rules.projections.period != self.rules.gates.period:
            raise UserError("the projections and the gates have one period; give their rules the same")
        one, *others = self.rules
        if any(dataclasses.replace(r, architecture=one.architecture, period=one.period) != one for r in others):
            raise UserError("the rules of the memory, projections and gates may differ in architecture and period only")

    @property
    def counts(self) -> tuple[int, int, int]:
        """Boxes of each group."""
        return (1, len(self.adaptive), 2)

    @property
    def periods(self) -> tuple[int, int]:
        """Anchor periods of the memory and of the others."""
        return (self.rules.memory.period, self.rules.gates.period)


def scan(
    spec: SelfModifying,
    initial: Boxes,
    tuning: Tuning,
    fast: Boxes,
    streams: Streams,
    position: Int[Array, ""] | np.ndarray,
    with_gates: bool = False,
) -> (
    tuple[Boxes, Float[Array, "T V"], Float[Array, "T K"] | None]
    | tuple[Boxes, Float[Array, "T V"], Float[Array, "T K"] | None, Gates]
):
    """Read T tokens with one head: the fast weights after them, the reads y, and q where a memory made it (else None).

    ``initial`` holds M_box,0 per group, ``fast`` the ``Fast`` weights per group, ``position`` the tokens since all
    anchors were last refreshed together. Any cut of the T tokens into calls gives the same result. ``with_gates``: the
    gates of every token come fourth.
    """
    stacks = stacks_of(spec.rules, spec.counts, initial)
    head = _Head(spec, stacks, tuning, join(stacks, initial), with_gates)

    def segment(fast, tokens, active, due):
        return _segment(head, _refresh(stacks, fast, due), tokens, active)

    joined = Fast(*(join(stacks, kind) for kind in zip(*fast, strict=True)))
    joined, outputs = scan_levels(segment, joined, streams, position=position, periods=spec.periods)
    kinds = [apart(stacks, kind) for kind in joined]
    ends = [Fast(*(kind[i] for kind in kinds)) if i in kinds[0] else start for i, start in enumerate(fast)]
    return Boxes(*ends), *outputs


class _Head(NamedTuple):
    """What stays the same while a sequence is read. ``initial``: M_box,0, joined; ``with_gates``: put the gates out."""

    spec: SelfModifying
    stacks: tuple[Stack, ...]
    tuning: Tuning
    initial: Weights
    with_gates: bool


def _refresh(stacks: tuple[Stack, ...], fast: Fast, due: tuple[Due, ...]) -> Fast:
    """Move the anchors that are due; the memory may have a period of its own."""
    if all(one is True for one in due):
        return fast._replace(anchor=fast.running)
    of_memory = np.repeat([i == 0 for stack in stacks for i in stack.groups], parts(stacks))
    of_rows = jnp.where(of_memory, *due)[:, None]
    of_stacks = [due[int(0 not in stack.groups)] for stack in stacks for _ in range(stack.later)]
    moved = zip((of_rows, *of_stacks), fast.anchor, fast.running, strict=True)
    return fast._replace(anchor=tuple(jnp.where(now, new, old) for now, old, new in moved))


def _segment(head: _Head, fast: Fast, tokens: Streams, active: Active) -> tuple[Fast, tuple[Any, ...]]:
    """Tokens inside one period: generate keys, values and gates at the anchors, then write every layer of every box."""
    anchors = apart(head.stacks, fast.anchor)
    tokens, gates = _generate(head, anchors, tokens)
    gates = _neutral(gates, active)
    terms = coefficients(gates.retention, gates.momentum_decay, active)
    layers = _layers(head, fast, _writes(head, fast.anchor, tokens, gates))
    written = advance_all(layers, parts(head.stacks), terms)
    reads = _read(head.stacks[0], anchors[0], layers, written, tokens.q, terms)
    outputs = (reads, tokens.q if "q" in head.spec.adaptive else None)
    return _updated(head, fast, written), (*outputs, gates) if head.with_gates else outputs


def _generate(head: _Head, anchors: dict[int, Weights], tokens: Streams) -> tuple[Streams, Gates]:
    """Adaptive projections, rate and retention of every token from their memories' anchors (Eq. 85, SPEC 2.1)."""
    spec, tuning = head.spec, head.tuning
    first, *later = anchors[2]
    of_x = per_box(nt(tokens.x, first.reshape(-1, first.shape[-1])), len(first))
    through = lambda z, later: spec.rules.gates.architecture.forward_from(z, later, tokens.x)[2]  # noqa: E731
    raw = jax.vmap(through)(of_x, tuple(later))[..., 0]
    rate = spec.rate_max * jax.nn.sigmoid(raw[0] + tuning.rate_bias)
    retention = jax.nn.sigmoid(raw[1] + tuning.retention_bias) if spec.retention else jnp.ones_like(rate)
    if spec.adaptive:
        inputs = jnp.stack([getattr(tokens, name) for name in spec.adaptive])
        outputs = unit(jax.vmap(spec.rules.projections.architecture.apply)(anchors[1], inputs))
        tokens = tokens._replace(**dict(zip(spec.adaptive, outputs, strict=True)))
    return tokens, Gates(rate, retention, tokens.momentum_decay)


def _neutral(gates: Gates, active: Active) -> Gates:
    """Gates that change nothing where a token is not active."""
    if active is None:
        return gates
    idle = 1 - active
    decay = None if gates.momentum_decay is None else active * gates.momentum_decay + idle
    return Gates(active * gates.rate, active * gates.retention + idle, decay)


def _writes(head: _Head, anchor: Weights, tokens: Streams, gates: Gates) -> list[LayerWrite]:
    """What is written into the first layers, taken as one memory, and into the later layers of each stack."""
    later = list(anchor[1:])
    sizes = [stack.boxes * stack.rows for stack in head.stacks]
    outputs = (split(nt(x, anchor[0]), sizes, axis=1) for x in (tokens.k, tokens.v))  # of every first layer
    firsts, rests = [], []
    for stack, *mine in zip(head.stacks, *outputs, strict=True):
        weights, later = tuple(later[: stack.later]), later[stack.later :]
        of_keys, of_values = (per_box(one, stack.boxes) for one in mine)
        scales = np.repeat(stack.groups, stack.counts)
        rates = jnp.exp(jnp.stack(head.tuning.log_rate)[scales])

        def box(scale, of_keys, of_values, weights, rule=stack.rule):
            own = gates._replace(rate=scale * gates.rate)
            return writes_from(rule, of_keys, of_values, weights, tokens.k, tokens.v, own)

        first, *rest = jax.vmap(box)(rates, of_keys, of_values, weights)
        firsts.append(first)
        rests += [write._replace(erase=None if write.erase is None else write.erase[..., None]) for write in rest]
    return [as_one(firsts, head.stacks, tokens.k), *rests]


def _layers(head: _Head, fast: Fast, writes: list[LayerWrite]) -> list[Layer]:
    rule = head.spec.rules.memory
    bases = head.initial if rule.retain_to == "init" else (None,) * len(writes)
    momenta = fast.momentum if rule.momentum else (None,) * len(writes)
    starts = (w if base is None else w - base for w, base in zip(fast.running, bases, strict=True))
    parts_of = zip(starts, momenta, bases, writes, strict=True)
    return [Layer(memory, momentum, base, *write) for memory, momentum, base, write in parts_of]


def _read(
    stack: Stack, anchor: Weights, layers: list[Layer], written: list[Written], queries: Array, terms: Coefficients
) -> Float[Array, "C V"]:
    """The reads of the main memory, the first box of the first stack, layer by layer."""
    rule = stack.rule
    if rule.read == "anchor":
        return finish(rule, anchor, queries, None)
    x = queries
    for index in range(rule.architecture.layers):
        one, erased = first_box(layers[index], written[index].erased, stack.rows)
        reads = recall(one.memory, one.momentum, one.base, one.keys, one.writes, erased, x, terms, rule.read)
        x = next_input(rule, index, reads)
    return finish(rule, anchor, queries, x)


def _updated(head: _Head, fast: Fast, written: list[Written]) -> Fast:
    """The fast weights after the segment."""
    running = tuple(one.memory for one in written)
    if head.spec.rules.memory.retain_to == "init":
        running = tuple(base + w for base, w in zip(head.initial, running, strict=True))
    momentum = tuple(one.momentum for one in written if one.momentum is not None)
    return fast._replace(running=running, momentum=momentum)
