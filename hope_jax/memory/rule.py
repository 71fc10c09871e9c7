"""A memory rule fills the slots of the one recurrence: objective x architecture x rates x anchor period x read.

The famous fillings are rows of ``catalogue.RULES``. Whatever the row, a memory is written by a gradient step of its
inner objective at every token, taken at

* ``running``: the memory as it is now. Linear memories only: the L2 gradient *is* the erase, a = rate (DeltaNet).
* ``retained``: the memory after retention, a = retention x rate (Gated DeltaNet).
* ``anchor``: the memory as it was at the last multiple of ``period`` tokens (TTT, Titans, Hope). Inside a period the
  gradient does not depend on the running memory, so the recurrence stays linear there, MLP memories included:
  every layer is a linear memory with its own input as key (SPEC 1.4).

``dgd_scope`` adds the proximal erase of delta gradient descent (Eq. 57, 88, 113): rate r = eta/(1 + eta ||z||^2) for a
layer with input z, once in the erase and once in the write. All functions are for one head of one sequence.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.memory import decays, objectives
from hope_jax.memory.architectures import Architecture, Weights
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

    @property
    def read_time(self) -> decays.ReadTime:
        """When the running memory is read."""
        return "after" if self.read == "after" else "before"

    def start(self, weights: Weights) -> Fast:
        """Fast weights at the start of a sequence: everything at M_0, no momentum."""
        anchor = weights if self.gradient_at == "anchor" else ()
        return Fast(anchor, weights, jax.tree.map(jnp.zeros_like, weights) if self.momentum else ())
