"""Self-modifying Titans as a pure function of one head of one sequence (SPEC 2; Eq. 83-93).

Six kinds of memory ("boxes") in two groups:

* ``memory``   what is read: y_t = M_memory,t-1(q_t)                                                      Eq. 83, 94
* ``others``   those that generate: k_t = unit(M_k(x_k,t)), v_t (and q_t on request), the inner learning rate eta_t
               and the retention alpha_t, all read at their anchors; stacked on axis N                    Eq. 85-86

All of them are written at every token with the same key, rate and retention, each towards the target it generates
itself, M_box(v_t) at its own anchor (Eq. 84, 87), by delta gradient descent with retention (Eq. 88, 90). The whole is
differentiable, writes included: nothing is under a stop-gradient. ``nn/self_modifying.py`` is the layer around it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.levels import Active, check_periods, scan_levels
from hope_jax.memory.architectures import Weights, unit
from hope_jax.memory.recurrence import Coefficients, Written, advance, coefficients, recall
from hope_jax.memory.rule import Fast, Gates, LayerWrite, Rule, finish, layer_writes, next_input, refresh
from hope_jax.types import Array, Float, Int

GATES = ("eta", "alpha")


class Boxes(NamedTuple):
    """One value per group: rules, initial weights, fast weights or log rate scales."""

    memory: Any
    others: Any


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
    """Learned scalars of one head: log of each box's rate scale ([] and [N]) and the biases of the two gates."""

    log_rate: Boxes
    rate_bias: Float[Array, ""]
    retention_bias: Float[Array, ""]


@dataclass(frozen=True)
class SelfModifying:
    """The static part: one rule per group, which projections are memories, the bound of the rate.

    Attributes:
      rules: ``Boxes`` of ``Rule``; periods of memory and others may differ, one dividing the other. The gate
        memories have one output and no residual connection; stacked with the projections they are padded with
        outputs that are, and stay, exactly zero.
      adaptive: names among "k", "v", "q" that are memories; the first boxes on axis N, before eta and alpha.
      rate_max: eta = rate_max * sigmoid(.); 0 switches every write off.
      retention: False sets alpha = 1.
    """

    rules: Boxes
    adaptive: tuple[str, ...]
    rate_max: float
    retention: bool

    def __post_init__(self) -> None:
        check_periods(self.periods)

    @property
    def periods(self) -> tuple[int, int]:
        """Anchor periods of the memory and of the others."""
        return (self.rules.memory.period, self.rules.others.period)

    @property
    def skip(self) -> Float[np.ndarray, " N"]:
        """Weight of the residual connection of each of the others: projections 1 (where residual), gates 0."""
        residual = float(self.rules.others.architecture.residual)
        return np.array([residual] * len(self.adaptive) + [0.0] * len(GATES), np.float32)


def scan(
    spec: SelfModifying, initial: Boxes, tuning: Tuning, fast: Boxes, streams: Streams, position: Int[Array, ""] | np.ndarray
) -> tuple[Boxes, Float[Array, "T V"]]:
    """Read T tokens with one head; returns the fast weights after them and the reads y.

    ``initial`` holds M_box,0 per group, ``fast`` the ``Fast`` weights per group, ``position`` the tokens since all
    anchors were last refreshed together. Any cut of the T tokens into calls gives the same result.
    """

    def segment(fast, tokens, active, due):
        fast = Boxes(*map(refresh, fast, due))
        return _segment(spec, initial, tuning, fast, tokens, active)

    return scan_levels(segment, fast, streams, position=position, periods=spec.periods)


def _segment(spec: SelfModifying, initial: Boxes, tuning: Tuning, fast: Boxes, tokens: Streams, active: Active):
    """Tokens inside one period: generate keys, values and gates at the anchors, then write every layer of every box."""
    skip = jnp.asarray(spec.skip, tokens.k.dtype)
    tokens, gates = _generate(spec, tuning, fast.others, tokens, skip)
    gates = _neutral(gates, active)
    terms = coefficients(gates.retention, gates.momentum_decay, active)

    def writes(rule: Rule, box: Fast, log_rate: Array, skip: Array | None = None) -> list[LayerWrite]:
        own = gates._replace(rate=jnp.exp(log_rate) * gates.rate)
        return layer_writes(rule, box, tokens.k, tokens.v, own, skip)

    rule, other = spec.rules
    layers = _layers(rule, fast.memory, initial.memory, writes(rule, fast.memory, tuning.log_rate.memory))
    other_writes = jax.vmap(lambda *box: writes(other, *box))(fast.others, tuning.log_rate.others, skip)
    written = _advance([_stacked(one) for one in layers] + _layers(other, fast.others, initial.others, other_writes), terms)
    own, rest = [jax.tree.map(lambda x: x[0], one) for one in written[: len(layers)]], written[len(layers) :]
    reads = _read(rule, fast.memory, layers, own, tokens.q, terms)
    return Boxes(_updated(rule, fast.memory, initial.memory, own), _updated(other, fast.others, initial.others, rest)), reads


def _generate(spec: SelfModifying, tuning: Tuning, fast: Fast, tokens: Streams, skip: Array) -> tuple[Streams, Gates]:
    """Adaptive projections, rate and retention of every token from their memories' anchors (Eq. 85, SPEC 2.1)."""
    inputs = jnp.stack([getattr(tokens, name) for name in spec.adaptive] + [tokens.x] * len(GATES))
    raw = jax.vmap(spec.rules.others.architecture.apply)(fast.anchor, inputs, skip)
    count = len(spec.adaptive)
    eta, alpha = raw[count, :, 0], raw[count + 1, :, 0]
    rate = spec.rate_max * jax.nn.sigmoid(eta + tuning.rate_bias)
    retention = jax.nn.sigmoid(alpha + tuning.retention_bias) if spec.retention else jnp.ones_like(rate)
    projections = dict(zip(spec.adaptive, unit(raw[:count]), strict=True))
    return tokens._replace(**projections), Gates(rate, retention, tokens.momentum_decay)


def _neutral(gates: Gates, active: Active) -> Gates:
    """Gates that change nothing where a token is not active."""
    if active is None:
        return gates
    kept = lambda gate: None if gate is None else active * gate + (1 - active)  # noqa: E731
    return Gates(active * gates.rate, kept(gates.retention), kept(gates.momentum_decay))


class _Layer(NamedTuple):
    """One linear memory with what is written into it: [V,K] or stacked [N,V,K]."""

    memory: Array
    momentum: Array | None
    base: Array | None
    write: LayerWrite


def _layers(rule: Rule, fast: Fast, initial: Weights, writes: list[LayerWrite]) -> list[_Layer]:
    bases = initial if rule.retain_to == "init" else [None] * len(writes)
    momenta = fast.momentum if rule.momentum else [None] * len(writes)
    starts = [w if base is None else w - base for w, base in zip(fast.running, bases, strict=True)]
    return [_Layer(*one) for one in zip(starts, momenta, bases, writes, strict=True)]


def _stacked(layer: _Layer) -> _Layer:
    return jax.tree.map(lambda x: x[None], layer)


def _advance(layers: list[_Layer], terms: Coefficients) -> list[Written]:
    """Advance stacked layers, all those of one shape together: the solves and products of a segment are a few calls."""
    shapes: dict[tuple, list[int]] = {}
    for i, layer in enumerate(layers):
        shapes.setdefault((layer.memory.shape[1:], layer.write.erase is None), []).append(i)
    written = {}
    for members in shapes.values():
        together = jax.tree.map(lambda *x: jnp.concatenate(x), *(layers[i] for i in members))
        out = jax.vmap(lambda one: advance(one.memory, one.momentum, one.base, *one.write, terms))(together)
        ends = np.cumsum([layers[i].memory.shape[0] for i in members])
        for i, start, end in zip(members, [0, *ends], ends, strict=False):
            written[i] = jax.tree.map(lambda x, start=start, end=end: x[start:end], out)
    return [written[i] for i in range(len(layers))]


def _read(rule: Rule, fast: Fast, layers: list[_Layer], written: list[Written], queries: Array, terms: Coefficients):
    """The main memory's reads, layer by layer."""
    if rule.read == "anchor":
        return finish(rule, fast, queries, None)
    x = queries
    for index, (layer, new) in enumerate(zip(layers, written, strict=True)):
        reads = recall(*layer[:3], layer.write.keys, layer.write.writes, new.erased, x, terms, rule.read)
        x = next_input(rule, index, reads)
    return finish(rule, fast, queries, x)


def _updated(rule: Rule, fast: Fast, initial: Weights, written: list[Written]) -> Fast:
    bases = initial if rule.retain_to == "init" else [0.0] * len(written)
    running = tuple(base + one.memory for base, one in zip(bases, written, strict=True))
    return fast._replace(running=running, momentum=tuple(one.momentum for one in written) if rule.momentum else ())
