"""Self-modifying Titans as a pure function of one head of one sequence (SPEC 2; Eq. 83-93).

Six kinds of memory ("boxes") in three groups; boxes of one group are stacked on axis N:

* ``memory``       what is read: y_t = M_memory,t-1(q_t) (a single box, no axis N)                      Eq. 83, 94
* ``projections``  [k, v, q as configured]  k_t = unit(M_k(x_k,t)), v_t, q_t, read at their anchors      Eq. 85-86
* ``gates``        [eta, alpha]  the inner learning rate and the retention of every box                  Eq. 85-86

All of them are written at every token with the same key, rate and retention, each towards the target it generates
itself, M_box(v_t) at its own anchor (Eq. 84, 87), by delta gradient descent with retention (Eq. 88, 90). The whole is
differentiable, writes included: nothing is under a stop-gradient. ``nn/self_modifying.py`` is the layer around it.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.levels import Active, check_periods, scan_levels
from hope_jax.memory.architectures import Weights, unit
from hope_jax.memory.block import Coefficients, Written, advance, coefficients, erase_matrix, recall
from hope_jax.memory.rule import Fast, Gates, LayerWrite, Rule, finish, layer_writes, next_input, refresh
from hope_jax.memory.triangular import unit_lower_inverse
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
      rules: ``Boxes`` of ``Rule``; periods of the memory and of the others may differ, one dividing the other.
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
) -> tuple[Boxes, Float[Array, "T V"]]:
    """Read T tokens with one head; returns the fast weights after them and the reads y.

    ``initial`` holds M_box,0 per group, ``fast`` the ``Fast`` weights per group, ``position`` the tokens since all
    anchors were last refreshed together. Any cut of the T tokens into calls gives the same result.
    """

    def segment(fast, tokens, active, due):
        fast = Boxes(refresh(fast.memory, due[0]), refresh(fast.projections, due[1]), refresh(fast.gates, due[1]))
        return _segment(spec, initial, tuning, fast, tokens, active)

    return scan_levels(segment, fast, streams, position=position, periods=spec.periods)


def _segment(spec: SelfModifying, initial: Boxes, tuning: Tuning, fast: Boxes, tokens: Streams, active: Active):
    """Tokens inside one period: generate keys, values and gates at the anchors, then write every layer of every box."""
    tokens, gates = _generate(spec, tuning, fast, tokens)
    gates = _neutral(gates, active)
    terms = coefficients(gates.retention, gates.momentum_decay, active)
    present = [i for i, group in enumerate(fast) if group.running[0].size]  # there may be no adaptive projection
    layers = {i: _layers(spec.rules[i], initial[i], fast[i], tuning.log_rate[i], tokens, gates, i > 0) for i in present}
    written = _advance([layer for i in present for layer in layers[i]], terms)
    depth = spec.rules.memory.architecture.layers
    reads = _read(spec.rules.memory, fast.memory, layers[0], written[:depth], tokens.q, terms)
    groups = list(fast)
    for i in present:
        new, written = written[: len(layers[i])], written[len(layers[i]) :]
        groups[i] = _updated(spec.rules[i], fast[i], initial[i], new)
    return Boxes(*groups), reads


def _generate(spec: SelfModifying, tuning: Tuning, fast: Boxes, tokens: Streams) -> tuple[Streams, Gates]:
    """Adaptive projections, rate and retention of every token from their memories' anchors (Eq. 85, SPEC 2.1)."""
    raw = jax.vmap(spec.rules.gates.architecture.apply, in_axes=(0, None))(fast.gates.anchor, tokens.x)[..., 0]
    rate = spec.rate_max * jax.nn.sigmoid(raw[0] + tuning.rate_bias)
    retention = jax.nn.sigmoid(raw[1] + tuning.retention_bias) if spec.retention else jnp.ones_like(rate)
    if spec.adaptive:
        inputs = jnp.stack([getattr(tokens, name) for name in spec.adaptive])
        outputs = unit(jax.vmap(spec.rules.projections.architecture.apply)(fast.projections.anchor, inputs))
        tokens = tokens._replace(**dict(zip(spec.adaptive, outputs, strict=True)))
    return tokens, Gates(rate, retention, tokens.momentum_decay)


def _neutral(gates: Gates, active: Active) -> Gates:
    """Gates that change nothing where a token is not active."""
    if active is None:
        return gates
    idle = 1 - active
    decay = None if gates.momentum_decay is None else active * gates.momentum_decay + idle
    return Gates(active * gates.rate, active * gates.retention + idle, decay)


class _Layer(NamedTuple):
    """One linear memory [V,K], or N of them stacked, with what is written into it."""

    memory: Array
    momentum: Array | None
    base: Array | None
    write: LayerWrite

    def each(self, function):
        """``function`` of one linear memory, mapped over the stack if this is one."""
        return jax.vmap(function) if self.memory.ndim == 3 else function


def _layers(rule: Rule, initial: Weights, fast: Fast, log_rate: Array, tokens: Streams, gates: Gates, stacked: bool):
    """Every layer of a group with its writes. First layers share key and rate: one linear memory with N V outputs."""
    own = gates._replace(rate=jnp.exp(log_rate) * gates.rate)
    box = lambda fast: layer_writes(rule, fast, tokens.k, tokens.v, own)  # noqa: E731
    writes = (jax.vmap(box) if stacked else box)(fast)
    if stacked:
        first = writes[0]
        erase = None if first.erase is None else first.erase[0]
        writes[0] = LayerWrite(first.keys[0], jnp.concatenate(list(first.writes), axis=-1), erase)
    bases = initial if rule.retain_to == "init" else (None,) * len(writes)
    momenta = fast.momentum if rule.momentum else (None,) * len(writes)
    starts = (w if base is None else w - base for w, base in zip(fast.running, bases, strict=True))
    layers = [_Layer(*one) for one in zip(starts, momenta, bases, writes, strict=True)]
    if stacked:
        memory, momentum, base = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), layers[0][:3])
        layers[0] = _Layer(memory, momentum, base, layers[0].write)
    return layers


def _advance(layers: list[_Layer], terms: Coefficients) -> list[Written]:
    """Write all layers; their triangular systems are inverted together, in one sequence of products."""
    inverses = _inverses(layers, terms)
    written = []
    for layer, inverse in zip(layers, inverses, strict=True):
        written.append(layer.each(functools.partial(_advance_one, terms))(layer, inverse))
    return written


def _advance_one(terms: Coefficients, layer: _Layer, inverse: Array | None) -> Written:
    keys, writes, erase = layer.write
    return advance(layer.memory, layer.momentum, layer.base, keys, writes, erase, terms, inverse)


def _inverses(layers: list[_Layer], terms: Coefficients) -> list[Array | None]:
    erasing = [i for i, layer in enumerate(layers) if layer.write.erase is not None]
    inverses: list[Array | None] = [None] * len(layers)
    if not erasing:
        return inverses
    lowers = [layers[i].each(lambda w: erase_matrix(w.keys, w.erase, terms))(layers[i].write) for i in erasing]
    stack = jnp.concatenate([x if x.ndim == 3 else x[None] for x in lowers])
    stack = jax.vmap(unit_lower_inverse)(jax.lax.stop_gradient(stack))
    start = 0
    for i, lower in zip(erasing, lowers, strict=True):
        count = lower.shape[0] if lower.ndim == 3 else 1
        inverses[i] = stack[start : start + count].reshape(lower.shape)
        start += count
    return inverses


def _read(rule: Rule, fast: Fast, layers: list[_Layer], written: list[Written], queries: Array, terms: Coefficients):
    """The main memory's reads, layer by layer."""
    if rule.read == "anchor":
        return finish(rule, fast, queries, None)
    x = queries
    for index, (layer, new) in enumerate(zip(layers, written, strict=True)):
        keys, writes, _ = layer.write
        reads = recall(layer.memory, layer.momentum, layer.base, keys, writes, new.erased, x, terms, rule.read)
        x = next_input(rule, index, reads)
    return finish(rule, fast, queries, x)


def _updated(rule: Rule, fast: Fast, initial: Weights, written: list[Written]) -> Fast:
    """The group after the segment, in its own shapes."""
    running = [one.memory.reshape(old.shape) for one, old in zip(written, fast.running, strict=True)]
    if rule.retain_to == "init":
        running = [base + w for base, w in zip(initial, running, strict=True)]
    momenta = [one.momentum for one in written if one.momentum is not None]
    momentum = tuple(new.reshape(old.shape) for new, old in zip(momenta, fast.momentum, strict=True))
    return fast._replace(running=tuple(running), momentum=momentum)
