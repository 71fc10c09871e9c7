"""A memory rule is a setting of the one recurrence: objective x architecture x rates x anchor period x read.

The known settings are rows of ``catalogue.RULES``. Whatever the row, a memory is written by a gradient step of its
inner objective at every token, taken at

* ``running``: the memory as it is now. Linear memories only: the L2 gradient *is* the erase, a = rate (DeltaNet).
* ``retained``: the memory after retention, a = retention x rate (Gated DeltaNet).
* ``anchor``: the memory as it was at the last multiple of ``period`` tokens (TTT, Titans, Hope). Inside a period the
  gradient does not depend on the running memory, so the recurrence stays linear there, MLP memories included:
  every layer is a linear memory with its own input as key (SPEC 1.4).

``dgd_scope`` adds the proximal erase of delta gradient descent (Eq. 57, 88, 113): rate r = eta/(1 + eta ||z||^2) for a
layer with input z, once in the erase and once in the write. ``layer_writes`` is that step, layer by layer (SPEC 1.3,
1.4). All functions are for one head of one sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from hope_jax.errors import UserError, check_choices, whole
from hope_jax.levels import Level
from hope_jax.memory import decays, objectives
from hope_jax.memory.architectures import Architecture, Weights
from hope_jax.memory.chunked import Write
from hope_jax.memory.kernels import Products
from hope_jax.types import Array, Float

GradientAt = Literal["running", "retained", "anchor"]
DGDScope = Literal["per_layer", "input_only", "none"]
RateForm = Literal["exact", "literal"]
ReadTime = Literal["before", "after", "anchor"]
RetainTo = Literal["zero", "init"]
Link = Callable[[Array], Array]


class Gates(NamedTuple):
    """Per token: inner learning rate eta >= 0 (theta in Titans), alpha and beta in [0, 1]; no beta without momentum."""

    rate: Float[Array, " T"]
    retention: Float[Array, " T"]
    momentum_decay: Float[Array, " T"] | None


class Fast(NamedTuple):
    """Weights that change while a sequence is read, each a tuple of [in, out] kernels, or () where there are none.

    ``span`` is the sum of the keys' k k^T, where queries are projected with it.
    """

    anchor: Weights
    running: Weights
    momentum: Weights
    span: Float[Array, "*N K K"] | None = None


@dataclass(frozen=True)
class Rule:
    """One memory rule.

    Attributes:
      architecture: the memory's layers.
      objective: inner loss of one token, see ``objectives.py``.
      gradient_at: where the inner gradient is taken (module docstring).
      period: anchor period C in tokens; a property of the model, not of the evaluator.
      read: "before" y_t = M_{t-1}(q_t), "after" M_t(q_t), "anchor" M_anchor(q_t).
      dgd_scope: layers with the DGD erase: "per_layer" all, "input_only" the first, "none" plain gradient descent.
      rate_form: "exact" r = eta/(1 + eta ||z||^2); "literal" r = eta.
      momentum: whether the writes go through the momentum S.
      damped: multiply writes by (1 - beta), so that momentum averages instead of sums (SPEC 2.5).
      retain_to: "zero" (Eq. 88) or "init": retention pulls towards the initial weights.
      self_values: the target is the memory's own output for the value, at its anchor (Eq. 84, 87).
      learned_start: the initial weights are parameters of the mixer; otherwise the memory, a matrix, starts at zero.
      shard: tokens after which everything is set back to its start, a multiple of the anchor period; None: never.
        Nothing crosses a shard, so the shards of a sequence can be read at the same time (TNT, arXiv 2511.07343).
      project_queries: read with unit(P_t q_t) instead of q_t, with P_t = sum k_s k_s^T / ||k_s||^2 over the keys up to
        and with t (of the shard): the memory is asked in the span of what it was trained on (TNT, Eq. 7).
      transposed: the memory stores the key under the value and is read through its transpose (Oja's rule); for values
        of norm 1, without an anchor.
      link: the weights that act are ``link`` of those that are written, layer by layer (``linked.py``); None: they
        are the same.
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
    shard: int | None = None
    project_queries: bool = False
    transposed: bool = False
    link: Link | None = None

    def __post_init__(self) -> None:
        Level(self.period)
        check_choices(self)
        if self.shard is not None:
            self._check_shard(whole("shard", self.shard, 1, "tokens; None: never set back"))
        if not self.learned_start and self.architecture.layers > 1:
            raise UserError("learned_start=False needs a matrix memory: an MLP cannot learn from weights that are 0")
        if self.gradient_at != "anchor":
            self._check_linear()
        elif self.transposed:
            raise UserError("transposed=True has no anchor; use gradient_at='running' or 'retained'")
        if self.link is not None:
            self._check_link()

    def _check_shard(self, shard: int) -> None:
        if self.gradient_at == "anchor" and shard % self.period:
            raise UserError(f"shard is {shard}; expected a multiple of the anchor period, {self.period}, or None")

    def _check_linear(self) -> None:
        where, memory = f"gradient_at={self.gradient_at!r}", self.architecture
        if memory.layers > 1 or memory.residual or memory.output is not None:
            raise UserError(f"{where} needs a matrix memory; use gradient_at='anchor' for an MLP")
        if self.objective not in (objectives.l2, objectives.dot):
            raise UserError(f"{where} needs the l2 or dot objective; use gradient_at='anchor' for others")
        anchored = [n for n, off in (("dgd_scope", "none"), ("retain_to", "zero")) if getattr(self, n) != off]
        anchored += ["read"] * (self.read == "anchor") + ["self_values"] * self.self_values
        anchored += ["link"] * (self.link is not None)
        if anchored:
            raise UserError(f"{where} has no anchor, which {', '.join(anchored)} needs; use gradient_at='anchor'")

    def _check_link(self) -> None:
        plain = dict(dgd_scope="none", retain_to="zero", momentum=False, learned_start=True)
        wrong = [f"{name}={value!r}" for name, value in plain.items() if getattr(self, name) != value]
        if wrong:
            raise UserError(f"a rule with a link is plain gradient descent; set {', '.join(wrong)}")

    @property
    def read_time(self) -> decays.ReadTime:
        """When the running memory is read."""
        return "after" if self.read == "after" else "before"

    @property
    def cycle(self) -> int:
        """Tokens after which the positions of anchors and shards repeat."""
        return self.period if self.shard is None else self.shard

    def start(self, weights: Weights) -> Fast:
        """Fast weights at the start of a sequence or shard: everything at M_0, no momentum, no keys."""
        anchor = self.acting(weights) if self.gradient_at == "anchor" else ()
        momentum = jax.tree.map(jnp.zeros_like, weights) if self.momentum else ()
        *copies, size, _ = weights[0].shape
        span = jnp.zeros((*copies, size, size), weights[0].dtype) if self.project_queries else None
        return Fast(anchor, weights, momentum, span)

    def acting(self, weights: Weights) -> Weights:
        """The weights that are applied to inputs, from those that are written."""
        return weights if self.link is None else tuple(self.link(w) for w in weights)

    def apply(self, weights: Weights, x: Float[Array, "T K"], products: Products) -> Float[Array, "T V"]:
        """The answer to ``x`` of a memory with these written weights."""
        if self.transposed:
            return products.matmul_nt(x, weights[0])
        return self.architecture.apply(self.acting(weights), x, products)


def layer_writes(
    rule: Rule,
    products: Products,
    later: Weights,
    pairs: tuple[Array, Array],
    first: tuple[Array, Array | None],
    gates: Gates,
    fresh: bool = False,
) -> list[Write]:
    """The write of every layer at the anchor (SPEC 1.4).

    ``pairs`` are keys [T,K] and values [T,V], ``first`` the first layer of the anchor applied to them (to the values
    only with ``self_values``), ``later`` the anchor's layers after it. ``fresh``: the memory still equals the anchor.
    """
    (keys, values), architecture = pairs, rule.architecture
    through = architecture.forward(first[0], later, products)
    if first[1] is not None:
        values = architecture.finish(first[1], later, values, products)
    prediction = through.answer + keys if architecture.residual else through.answer
    error = objectives.error(rule.objective, prediction, values)
    errors = [error if through.back is None else through.back(error)[0]]
    for w, back in zip(later[::-1], through.backs[::-1], strict=True):
        errors.insert(0, back(products.matmul_nt(errors[0], w))[0])
    layers = enumerate(zip([keys, *through.inputs], errors, strict=True))
    writes = [layer_write(rule, i, z, error, gates) for i, (z, error) in layers]
    if not fresh:
        return writes
    return [replace(one, memory_at_keys=output) for one, output in zip(writes, through.outputs, strict=True)]


def layer_write(rule: Rule, layer: int, z: Array, error: Array, gates: Gates) -> Write:
    """From the layer's input z and the inner gradient at its output (without an anchor: less the memory's own part)."""
    (rate, erase), decay = _rates(rule, layer, z, gates), gates.momentum_decay
    if rule.momentum != (decay is not None):
        came = "None" if decay is None else "given"
        raise UserError(f"momentum_decay is {came}; expected one for a rule with momentum, and None for others")
    if decay is not None and rule.damped:
        rate = rate * (1 - decay)
    return Write(z, -rate[:, None] * error, erase)


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
