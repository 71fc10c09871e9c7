"""All training optimizers in one table: each row is a frozen dataclass of its settings that builds the optimizer.

``OPTIMIZERS`` names them. The fields of a row are its flags on the command line, its JSON in a run folder, and nothing
else: learning rate, schedule, clip and levels belong to the training (``train/optimizer.py``).

>>> tx = OPTIMIZERS["m3"].build(1e-3)                  # an optax transformation
>>> tx = M3(slow_period=20, weight_decay=0.0).build(optax.cosine_decay_schedule(1e-3, 1000))
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import optax

from hope_jax.errors import check_choices, whole
from hope_jax.optim.checks import check
from hope_jax.optim.delta_momentum import Form, scale_by_delta_momentum
from hope_jax.optim.dmgd import MLPMemory, scale_by_dmgd
from hope_jax.optim.m3 import scale_by_m3
from hope_jax.optim.m3_rules import MomentumScale
from hope_jax.optim.matrices import Labels, MatrixView, dimension_numbers, labels_or_default, matrix_views
from hope_jax.optim.preconditioned import learned_preconditioner, scale_by_preconditioned_momentum
from hope_jax.optim.recipe import recipe

BELOW_1 = ("b1", "b2", "momentum")
UP_TO_1 = ("decay", "slow_decay", "preconditioner_rate")
NOT_NEGATIVE = ("weight_decay", "erase", "inner_rate")
WHOLE = {"slow_period": "optimizer steps", "hidden": "features"}


@dataclass(frozen=True)
class Optimizer(abc.ABC):
    """Settings of a training optimizer, numbers and words alone. Each subclass is one optimizer."""

    weight_decay: float = field(default=0.1, kw_only=True)
    """Decoupled weight decay, multiplied by the learning rate; 0 or more."""
    by_matrix: ClassVar[bool] = False
    """Whether a step of a matrix depends on all of it, and not number by number."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name, value in vars(self).items():
            if name in WHOLE and value is not None:
                whole(name, value, 1, WHOLE[name])
            elif name in BELOW_1:
                check(name, value, 0, 1)
            elif name in UP_TO_1 and value is not None:
                check(name, value, 0, 1, open_high=False)
            elif name in NOT_NEGATIVE and value is not None:
                check(name, value, 0)

    def build(
        self,
        rate: optax.ScalarOrSchedule,
        matrices: Labels | None = None,
        decays: Callable[[Any], Any] | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer.

        Args:
          rate: the learning rate, a number or a schedule over the optimizer's own steps.
          matrices: ``params -> labels``, see ``matrices.py``; None: leaves of two axes, but no embeddings and heads.
          decays: ``params -> tree of booleans``, the leaves that weight decay moves; None: all.
        """
        rest = self._rest()
        fallback = None if rest is None else rest.build(rate, decays=decays)
        return recipe(self._scale(matrices), rate, self.weight_decay, decays, fallback, matrices)

    @abc.abstractmethod
    def _scale(self, matrices: Labels | None) -> optax.GradientTransformation:
        """The transformation of the gradients."""

    def _rest(self) -> "Optimizer | None":
        """The optimizer of the leaves that are no matrices; None: there is no other."""
        return None


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay."""

    b1: float = 0.9
    """Decay of the first moment, from 0 up to but not including 1."""
    b2: float = 0.95
    """Decay of the second moment, from 0 up to but not including 1."""

    def _scale(self, matrices: Labels | None) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2)


@dataclass(frozen=True)
class Muon(Optimizer):
    """optax's Muon for matrices, with steps of the size of Adam's; AdamW for the rest."""

    by_matrix = True
    momentum: float = 0.95
    """Decay of the momentum of matrices, from 0 up to but not including 1."""
    nesterov: bool = True
    """Whether the momentum looks one step ahead."""
    b1: float = 0.9
    """Decay of AdamW's first moment, from 0 up to but not including 1."""
    b2: float = 0.95
    """Decay of AdamW's second moment, from 0 up to but not including 1."""

    def _scale(self, matrices: Labels | None) -> optax.GradientTransformation:
        labels = labels_or_default(matrices)
        numbers = dimension_numbers(labels)
        muon = optax.contrib.scale_by_muon(beta=self.momentum, nesterov=self.nesterov, weight_dimension_numbers=numbers)
        return optax.chain(muon, _steps_like_adams(labels))

    def _rest(self) -> Optimizer:
        return AdamW(self.b1, self.b2, weight_decay=self.weight_decay)


def _steps_like_adams(labels: Labels) -> optax.GradientTransformation:
    """Orthogonal matrices times ``0.2 sqrt(max(rows, columns))``, see ``newton_schulz.muon_step``."""

    def scale(update: Any, view: MatrixView) -> Any:
        return 0.2 * max(view.matrix_shape[-2:]) ** 0.5 * update

    return optax.stateless(lambda updates, _: jax.tree.map(scale, updates, matrix_views(updates, labels)))


@dataclass(frozen=True)
class M3(Optimizer):
    """Multi-scale momentum Muon (Eq. 75): fast and slow orthogonalised momenta for matrices, AdamW for the rest."""

    by_matrix = True
    b1: float = 0.9
    """Decay of the fast momentum and of AdamW's first moment, from 0 up to but not including 1."""
    b2: float = 0.95
    """Decay of the second moments, from 0 up to but not including 1."""
    slow_period: int | None = 100
    """Steps between two updates of the slow momentum; None: there is no slow momentum."""
    slow_decay: float = 0.9
    """Decay of the slow momentum per period, 0 to 1."""
    slow_weight: float = 1.0
    """Weight of the slow direction; the fast one has 1."""

    def _scale(self, matrices: Labels | None) -> optax.GradientTransformation:
        scales = (MomentumScale(1, self.b1),)
        if self.slow_period is not None:
            scales += (MomentumScale(self.slow_period, self.slow_decay, self.slow_weight),)
        return scale_by_m3(scales, self.b2, matrices=matrices)

    def _rest(self) -> Optimizer:
        return AdamW(self.b1, self.b2, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class DeltaMomentum(Optimizer):
    """Momentum that forgets along the gradients it meets (Eq. 48-49). It wants the learning rates of SGD."""

    by_matrix = True
    decay: float = 0.9
    """Decay of the momentum, 0 to 1."""
    erase: float = 1.0
    """Strength of the erase in units of the squared gradient, 0 or more."""
    form: Form = "gram"
    """gram erases along the gradient, scalar in all directions alike, raw as printed (not stable)."""

    def _scale(self, matrices: Labels | None) -> optax.GradientTransformation:
        return scale_by_delta_momentum(self.decay, self.erase, self.form, matrices=matrices)


@dataclass(frozen=True)
class DMGD(Optimizer):
    """Deep momentum gradient descent (Eq. 50-52): the momentum is a network. It wants the learning rates of SGD."""

    by_matrix = True
    memory: Literal["mlp", "linear"] = "mlp"
    """What the momentum is: a residual MLP per matrix, or one matrix (plain momentum)."""
    hidden: int = 32
    """Hidden features of the MLP, 1 or more."""
    decay: float | None = None
    """Share of the memory kept per step, 0 to 1; None: 0.99 for the MLP, 0.9 for the matrix."""
    inner_rate: float | None = None
    """Step of the inner gradient descent, 0 or more; None: 0.1 for the MLP, 1 for the matrix."""
    target: Literal["precond", "momentum", "self"] | None = None
    """What the memory learns to answer; None: precond for the MLP, self for the matrix."""

    def _scale(self, matrices: Labels | None) -> optax.GradientTransformation:
        memory = MLPMemory(self.hidden) if self.memory == "mlp" else self.memory
        return scale_by_dmgd(memory, self.decay, self.inner_rate, self.target, matrices=matrices)


@dataclass(frozen=True)
class PreconditionedMomentum(Optimizer):
    """Momentum of gradients that a learned diagonal preconditioner has divided by their size (Eq. 38-41, 47)."""

    decay: float = 0.9
    """Decay of the momentum, 0 to 1."""
    preconditioner_rate: float = 0.01
    """Step with which the preconditioner learns, above 0 and up to 1."""

    def _scale(self, matrices: Labels | None) -> optax.GradientTransformation:
        return scale_by_preconditioned_momentum(self.decay, learned_preconditioner(self.preconditioner_rate))


@dataclass(frozen=True)
class SGD(Optimizer):
    """Gradient descent with momentum."""

    momentum: float = 0.9
    """Decay of the momentum, from 0 up to but not including 1."""
    nesterov: bool = False
    """Whether the momentum looks one step ahead."""

    def _scale(self, matrices: Labels | None) -> optax.GradientTransformation:
        return optax.trace(self.momentum, self.nesterov)


@dataclass(frozen=True)
class Lion(Optimizer):
    """The sign of a momentum. It wants a third to a tenth of AdamW's learning rate."""

    b1: float = 0.9
    """Share of the momentum in the step, from 0 up to but not including 1."""
    b2: float = 0.99
    """Decay of the momentum, from 0 up to but not including 1."""

    def _scale(self, matrices: Labels | None) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.b1, self.b2)


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": AdamW(),
    "muon": Muon(),
    "m3": M3(),
    "adamuon": M3(slow_period=None),
    "delta_momentum": DeltaMomentum(),
    "dmgd": DMGD(),
    "preconditioned_momentum": PreconditionedMomentum(),
    "sgd": SGD(),
    "lion": Lion(),
}
"""Every training optimizer by name, with its default settings. ``generalized_momentum`` is none: it takes functions."""
