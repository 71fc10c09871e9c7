"""A memory rule fills the slots of the one recurrence: objective x architecture x rates x anchor period x read.

The famous fillings are rows of ``catalogue.RULES``. Whatever the row, a memory is written by a gradient step of its
inner objective at every token, taken at

* ``running``: the memory as it is now. Linear memories only: the L2 gradient *is* the erase, a = rate (DeltaNet).
* ``retained``: the memory after retention, a = retention x rate (Gated DeltaNet).
* ``anchor``: the memory as it was at the last multiple of ``period`` tokens (TTT, Titans, Hope). Inside a period the
  gradient does not depend on the running memory, so the recurrence stays linear there, MLP memories included:
  every layer is one call of ``gated_delta`` with its own input as key (SPEC 1.4).

``dgd_scope`` adds the proximal erase of delta gradient descent (Eq. 57, 88, 113): rate r = eta/(1 + eta ||z||^2) for a
layer with input z, once in the erase and once in the write. All functions are for one head of one sequence.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.errors import UserError
from hope_jax.levels import Due, Level, scan_levels
from hope_jax.memory import objectives
from hope_jax.memory.architectures import Architecture, Weights
from hope_jax.memory.products import flip, nt
from hope_jax.memory.recurrence import Impl, gated_delta
from hope_jax.types import Array, Float, Int, PRNGKeyArray

GradientAt = Literal["running", "retained", "anchor"]
DGDScope = Literal["per_layer", "input_only", "none"]
RateForm = Literal["exact", "literal"]
ReadTime = Literal["before", "after", "anchor"]
RetainTo = Literal["zero", "init"]


class Gates(NamedTuple):
    """Per-token gates of one head.

    Attributes:
      rate: inner learning rate eta >= 0 (theta in Titans).
      retention: alpha in [0, 1]; 1 keeps.
      momentum_decay: beta in [0, 1], or None for a rule without momentum.
    """

    rate: Float[Array, " T"]
    retention: Float[Array, " T"]
    momentum_decay: Float[Array, " T"] | None


class Fast(NamedTuple):
    """Weights that change while a sequence is read; each a tuple of [in, out] kernels, empty where unused."""

    anchor: Weights
    running: Weights
    momentum: Weights


class MemoryState(NamedTuple):
    """Fast weights and the number of tokens since the last anchor refresh."""

    fast: Fast
    position: Int[Array, ""] | np.ndarray


@dataclass(frozen=True)
class Rule:
    """One memory rule.

    Attributes:
      architecture: the memory's layers.
      objective: inner loss of one token, ``(prediction, value) -> scalar``.
      gradient_at: where the inner gradient is taken (module docstring).
      period: anchor period C in tokens; a property of the model, not of the evaluator.
      read: "before" y_t = M_{t-1}(q_t), "after" M_t(q_t), "anchor" M_anchor(q_t).
      dgd_scope: layers with the DGD erase: "per_layer" all, "input_only" the first, "none" plain gradient descent.
      rate_form: "exact" r = eta/(1 + eta ||z||^2); "literal" r = eta.
      momentum: whether the writes go through the momentum S.
      damped: multiply writes by (1 - beta), so that momentum averages instead of sums (SPEC 2.5).
      retain_to: "zero" (Eq. 88) or "init": retention pulls towards the initial weights.
      self_values: the target is the memory's own output for the value, at its anchor (Eq. 84, 87).
      learned_start: the initial weights are parameters; otherwise the memory starts at zero.
    """

    architecture: Architecture
    objective: objectives.Objective = objectives.l2
    gradient_at: GradientAt = "anchor"
    period: int = 16
    read: ReadTime = "before"
    dgd_scope: DGDScope = "none"
    rate_form: RateForm = "exact"
    momentum: bool = False
    damped: bool = True
    retain_to: RetainTo = "zero"
    self_values: bool = False
    learned_start: bool = True

    def __post_init__(self) -> None:
        Level(self.period)
        choices = dict(
            gradient_at=GradientAt, read=ReadTime, dgd_scope=DGDScope, rate_form=RateForm, retain_to=RetainTo
        )
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                raise UserError(f"{name} is {getattr(self, name)!r}; expected one of {get_args(allowed)}")
        if self.gradient_at != "anchor":
            self._check_linear()

    def _check_linear(self) -> None:
        where = f"gradient_at={self.gradient_at!r}"
        if self.architecture.layers > 1 or self.architecture.residual:
            raise UserError(f"{where} needs a matrix memory; use gradient_at='anchor' for an MLP")
        if self.objective not in (objectives.l2, objectives.dot):
            raise UserError(f"{where} needs the l2 or dot objective; use gradient_at='anchor' for others")
        anchored = [n for n, off in (("dgd_scope", "none"), ("retain_to", "zero")) if getattr(self, n) != off]
        anchored += ["read"] * (self.read == "anchor") + ["self_values"] * self.self_values
        if anchored:
            raise UserError(f"{where} has no anchor, which {', '.join(anchored)} needs; use gradient_at='anchor'")

    def init_weights(self, key: PRNGKeyArray, key_dim: int, value_dim: int, hidden: int) -> Weights:
        """Initial weights M_0 of one head."""
        weights = self.architecture.init(key, key_dim, value_dim, hidden)
        return weights if self.learned_start else jax.tree.map(jnp.zeros_like, weights)

    def start(self, weights: Weights) -> Fast:
        """Fast weights at the start of a sequence: everything at M_0, no momentum."""
        anchor = weights if self.gradient_at == "anchor" else ()
        return Fast(anchor, weights, jax.tree.map(jnp.zeros_like, weights) if self.momentum else ())


def refresh(fast: Fast, due: Due) -> Fast:
    """Move the anchor to the running weights where the level is due."""
    if not fast.anchor:
        return fast
    if due is True:
        return fast._replace(anchor=fast.running)
    return fast._replace(anchor=jax.tree.map(lambda old, new: jnp.where(due, new, old), fast.anchor, fast.running))


def scan(
    rule: Rule,
    state: MemoryState,
    keys: Float[Array, "T K"],
    values: Float[Array, "T V"],
    queries: Float[Array, "T K"],
    gates: Gates,
    initial: Weights,
    impl: Impl = "chunked",
    count: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "T V"], MemoryState]:
    """Read and write one memory over T tokens, with anchors on the grid of absolute positions.

    ``initial`` are the weights M_0 the sequence started from (used by ``retain_to="init"``). Any cut of the T
    tokens into calls gives the same reads and final state. ``count``: tokens that are real, from the first; None: all.
    """
    position = (state.position + (keys.shape[0] if count is None else count)) % rule.period
    if rule.gradient_at != "anchor":
        active = None if count is None else (jnp.arange(keys.shape[0]) < count).astype(jnp.float32)
        fast, reads = write(rule, state.fast, (keys, values, queries, gates), active, initial, impl)
        return reads, MemoryState(fast, position)

    def segment(fast, tokens, active, due):
        return write(rule, refresh(fast, due[0]), tokens, active, initial, impl)

    tokens = (keys, values, queries, gates)
    grid = {"position": state.position, "periods": (rule.period,), "count": count}
    fast, reads = scan_levels(segment, state.fast, tokens, **grid)
    return reads, MemoryState(fast, position)


def write(
    rule: Rule,
    fast: Fast,
    tokens: tuple[Array, Array, Array, Gates],
    active: Float[Array, " T"] | None,
    initial: Weights,
    impl: Impl = "chunked",
) -> tuple[Fast, Float[Array, "T V"]]:
    """Write (keys, values) and read queries inside one period (any length when there is no anchor).

    ``tokens`` is (keys [T,K], values [T,V], queries [T,K], gates). Returns the new fast weights and the reads.
    """
    keys, values, queries, gates = tokens
    running, momentum, x = [], [], queries
    for layer, one in enumerate(layer_writes(rule, fast, keys, values, gates)):
        memory = fast.running[layer]
        base = initial[layer] if rule.retain_to == "init" else None
        out = gated_delta(
            flip(memory if base is None else memory - base),
            one.keys,
            one.writes,
            None if rule.read == "anchor" else x,
            retention=gates.retention,
            erase=one.erase,
            momentum=flip(fast.momentum[layer]) if rule.momentum else None,
            momentum_decay=gates.momentum_decay if rule.momentum else None,
            base=None if base is None else flip(base),
            active=active,
            read="after" if rule.read == "after" else "before",
            impl=impl,
        )
        x = next_input(rule, layer, out.reads)
        running.append(flip(out.memory) if base is None else flip(out.memory) + base)
        momentum += [] if out.momentum is None else [flip(out.momentum)]
    return fast._replace(running=tuple(running), momentum=tuple(momentum)), finish(rule, fast.anchor, queries, x)


class LayerWrite(NamedTuple):
    """What the inner gradient steps of T tokens do to one layer: w_t against k_t, and the erase (None: none).

    ``held`` is what the anchor's layer has for the keys (None: not asked).
    """

    keys: Float[Array, "T K"]
    writes: Float[Array, "T V"]
    erase: Float[Array, " T"] | None
    held: Float[Array, "T V"] | None = None


def layer_writes(rule: Rule, fast: Fast, keys: Array, values: Array, gates: Gates) -> list[LayerWrite]:
    """The write of every layer (SPEC 1.4), at the anchor where the rule has one."""
    if rule.gradient_at != "anchor":
        return _writes(rule, [keys], [-values], gates)
    architecture = rule.architecture
    if rule.self_values:
        values = architecture.apply(fast.anchor, values)
    through = architecture.forward(fast.anchor, keys)
    errors = [objectives.error(rule.objective, through.output, values)]
    for w, back in zip(fast.anchor[:0:-1], through.backs[::-1], strict=True):
        errors.insert(0, back(nt(errors[0], w))[0])
    writes = _writes(rule, through.inputs, errors, gates)
    return [write._replace(held=held) for write, held in zip(writes, through.products, strict=True)]


def _writes(rule: Rule, inputs: list[Array], errors: list[Array], gates: Gates) -> list[LayerWrite]:
    """The write of every layer, from its input and the inner gradient at its output (without anchor: less its own)."""
    writes = []
    for layer, (z, delta) in enumerate(zip(inputs, errors, strict=True)):
        rate, erase = _rates(rule, layer, z, gates)
        if rule.momentum and rule.damped and gates.momentum_decay is not None:
            rate = rate * (1 - gates.momentum_decay)
        writes.append(LayerWrite(z, -rate[:, None] * delta, erase))
    return writes


def next_input(rule: Rule, layer: int, reads: Array | None) -> Any:
    """What the layer after ``layer`` is read with (the last layer's reads are the result)."""
    last = layer + 1 == rule.architecture.layers
    return reads if last or reads is None else rule.architecture.activation(reads)


def finish(rule: Rule, anchor: Weights, queries: Array, reads: Array | None) -> Array:
    """The memory's output from its last layer's reads."""
    if rule.read == "anchor":
        return rule.architecture.apply(anchor, queries)
    assert reads is not None
    return reads + queries if rule.architecture.residual else reads


def _rates(rule: Rule, layer: int, z: Array, gates: Gates) -> tuple[Array, Array | None]:
    """Write rate and erase of one layer (None: no erase)."""
    if rule.gradient_at != "anchor":
        erase = gates.rate * gates.retention if rule.gradient_at == "retained" else gates.rate
        return gates.rate, erase if rule.objective is objectives.l2 else None
    if rule.dgd_scope == "none" or (rule.dgd_scope == "input_only" and layer > 0):
        return gates.rate, None
    if rule.rate_form == "literal":
        return gates.rate, gates.rate
    rate = gates.rate / (1 + gates.rate * jnp.sum(jnp.square(z), axis=-1))
    return rate, rate
