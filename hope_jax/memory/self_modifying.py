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
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.errors import UserError
from hope_jax.levels import Active, Due, check_periods, scan_levels
from hope_jax.memory.architectures import Weights, unit
from hope_jax.memory.block import Coefficients, Written, coefficients, recall
from hope_jax.memory.products import gram
from hope_jax.memory.rule import Fast, Gates, Rule, finish, layer_writes, next_input, refresh
from hope_jax.memory.side_by_side import Layer, advance_all
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
    count: Int[Array, ""] | None = None,
) -> (
    tuple[Boxes, Float[Array, "T V"], Float[Array, "T K"] | None]
    | tuple[Boxes, Float[Array, "T V"], Float[Array, "T K"] | None, Gates]
):
    """Read T tokens with one head: the fast weights after them, the reads y, and q where a memory made it (else None).

    ``initial`` holds M_box,0 per group, ``fast`` the ``Fast`` weights per group, ``position`` the tokens since all
    anchors were last refreshed together. Any cut of the T tokens into calls gives the same result. ``with_gates``: the
    gates of every token come fourth. ``count``: tokens that are real, from the first; None: all.
    """
    head = _Head(spec, initial, tuning, with_gates)

    def segment(fast, tokens, active, due):
        return _segment(head, fast, tokens, active, due)

    fast, outputs = scan_levels(segment, fast, streams, position=position, periods=spec.periods, count=count)
    return fast, *outputs


class _Head(NamedTuple):
    """What stays the same while a sequence is read: ``initial`` is M_box,0; ``with_gates`` asks for the gates, too."""

    spec: SelfModifying
    initial: Boxes
    tuning: Tuning
    with_gates: bool


def _segment(
    head: _Head, fast: Boxes, tokens: Streams, active: Active, due: tuple[Due, ...]
) -> tuple[Boxes, tuple[Any, ...]]:
    """Tokens inside one period: generate keys, values and gates at the anchors, then write every layer of every box."""
    of_groups = Boxes(due[0], due[1], due[1])
    fast = Boxes(*(refresh(one, now) for one, now in zip(fast, of_groups, strict=True)))
    tokens, gates = _generate(head, fast, tokens)
    gates = _neutral(gates, active)
    terms = coefficients(gates.retention, gates.momentum_decay, active)
    alike = gram(tokens.k)
    layers = [_layers(head, group, fast[group], now, tokens, gates, alike) for group, now in enumerate(of_groups)]
    all_written = iter(advance_all([layer for group in layers for layer in group], terms))
    written = [[next(all_written) for _ in group] for group in layers]
    reads = _read(head.spec.rules.memory, fast.memory.anchor, layers[0], written[0], tokens.q, terms)
    outputs = (reads, tokens.q if "q" in head.spec.adaptive else None)
    ends = Boxes(*map(_updated, fast, layers, written))
    return ends, (*outputs, gates) if head.with_gates else outputs


def _generate(head: _Head, fast: Boxes, tokens: Streams) -> tuple[Streams, Gates]:
    """Adaptive projections, rate and retention of every token from their memories' anchors (Eq. 85, SPEC 2.1)."""
    spec, tuning = head.spec, head.tuning
    raw = jax.vmap(spec.rules.gates.architecture.apply)(fast.gates.anchor, _copies(tokens.x, 2))[..., 0]
    rate = spec.rate_max * jax.nn.sigmoid(raw[0] + tuning.rate_bias)
    retention = jax.nn.sigmoid(raw[1] + tuning.retention_bias) if spec.retention else jnp.ones_like(rate)
    if spec.adaptive:
        inputs = jnp.stack([getattr(tokens, name) for name in spec.adaptive])
        outputs = unit(jax.vmap(spec.rules.projections.architecture.apply)(fast.projections.anchor, inputs))
        tokens = tokens._replace(**dict(zip(spec.adaptive, outputs, strict=True)))
    return tokens, Gates(rate, retention, tokens.momentum_decay)


def _copies(x: Array, boxes: int) -> Array:
    """One for each box: the product of boxes with what they share would not come out as a batch of products."""
    return jnp.broadcast_to(x, (boxes, *x.shape))


def _neutral(gates: Gates, active: Active) -> Gates:
    """Gates that change nothing where a token is not active."""
    if active is None:
        return gates
    idle = 1 - active
    decay = None if gates.momentum_decay is None else active * gates.momentum_decay + idle
    return Gates(active * gates.rate, active * gates.retention + idle, decay)


def _layers(
    head: _Head, group: int, fast: Fast, due: Due, tokens: Streams, gates: Gates, alike: Float[Array, "C C"]
) -> list[Layer]:
    """The layers of one group with what is written into them; a group without boxes has none.

    ``alike`` is the ``gram`` of the keys, which are those of the first layer of every box.
    """
    rule, boxes = head.spec.rules[group], head.spec.counts[group]
    if not boxes:
        return []
    gates = gates._replace(rate=jnp.exp(head.tuning.log_rate[group]) * gates.rate)
    write, alike_of, keys, values = functools.partial(layer_writes, rule, gates=gates), gram, tokens.k, tokens.v
    if group != 0:  # the main memory is a single box
        write, alike_of = jax.vmap(write), jax.vmap(gram)
        keys, values, alike = (_copies(x, boxes) for x in (keys, values, alike))
    layers = []
    for index, one in enumerate(write(fast, keys, values)):
        base = head.initial[group][index] if rule.retain_to == "init" else None
        memory = fast.running[index] if base is None else fast.running[index] - base
        momentum = fast.momentum[index] if rule.momentum else None
        # Just refreshed, the anchor is the running memory: what it has for the keys need not be asked twice.
        held = one.held if due is True and base is None else None
        own: Array = alike_of(one.keys) if index else alike
        layers.append(Layer(memory, momentum, base, one.keys, own, one.writes, one.erase, held, shared=index == 0))
    return layers


def _read(
    rule: Rule, anchor: Weights, layers: list[Layer], written: list[Written], queries: Array, terms: Coefficients
) -> Float[Array, "C V"]:
    """The reads of the main memory, layer by layer."""
    if rule.read == "anchor":
        return finish(rule, anchor, queries, None)
    x = queries
    for index, (one, now) in enumerate(zip(layers, written, strict=True)):
        reads = recall(one.memory, one.momentum, one.base, one.keys, one.writes, now.erased, x, terms, rule.read)
        x = next_input(rule, index, reads)
    return finish(rule, anchor, queries, x)


def _updated(fast: Fast, layers: list[Layer], written: list[Written]) -> Fast:
    """The fast weights of a group after the segment."""
    if not layers:
        return fast
    pairs = zip(layers, written, strict=True)
    running = tuple(now.memory if one.base is None else one.base + now.memory for one, now in pairs)
    return fast._replace(running=running, momentum=tuple(n.momentum for n in written if n.momentum is not None))
