"""What one step of M3 does with one leaf: averages, orthogonal directions, the size of the step (SPEC 5.5)."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax import lax

from hope_jax.errors import UserError
from hope_jax.optim.checks import check, check_whole
from hope_jax.optim.matrices import MatrixView
from hope_jax.optim.newton_schulz import NewtonSchulz
from hope_jax.types import Array

Accumulate = Literal["ema", "sum"]
SecondMoment = Literal["normalized", "none", "literal"]


@dataclass(frozen=True)
class MomentumScale:
    """One momentum of M3.

    Attributes:
      period: steps between two updates of its direction; 1 is the fast scale, which sees the present gradient.
      decay: b of the scale, 0 to 1: share kept per update (ema), or factor on what comes in (sum).
      weight: of its orthogonalised direction in the step.
    """

    period: int
    decay: Any
    weight: Any = 1.0

    def __post_init__(self) -> None:
        check_whole("period", self.period, 1, "optimizer steps")
        check("decay", self.decay, 0, 1, open_high=False)
        check("weight", self.weight, -float("inf"))


TWO_SCALES = (MomentumScale(1, 0.9), MomentumScale(100, 0.9))


@dataclass(frozen=True)
class Rules:
    """The arguments of ``scale_by_m3``, checked, and the arithmetic of one leaf that they decide."""

    scales: Any
    second_decay: Any
    accumulate: Accumulate
    second_moment: SecondMoment
    update_rms: Any
    eps: Any
    newton_schulz: NewtonSchulz

    def __post_init__(self) -> None:
        if not isinstance(self.newton_schulz, NewtonSchulz):
            raise UserError(f"newton_schulz is {self.newton_schulz!r}; expected NewtonSchulz(steps, method, dtype)")
        for name, allowed in (("accumulate", Accumulate), ("second_moment", SecondMoment)):
            if getattr(self, name) not in get_args(allowed):
                raise UserError(f"{name} is {getattr(self, name)!r}; expected one of {get_args(allowed)}")
        several = isinstance(self.scales, tuple | list) and len(self.scales) > 0
        if not (several and all(isinstance(scale, MomentumScale) for scale in self.scales)):
            raise UserError(f"scales is {self.scales!r}; expected a tuple of MomentumScale(period, decay, weight)")
        decays = {f"decay of scale {i + 1}": scale.decay for i, scale in enumerate(self.scales)}
        for name, decay in {**decays, "second_decay": self.second_decay}.items():
            check(name, decay, 0, 1, open_high=self.accumulate == "ema")
        check("eps", self.eps, 0, open_low=True)
        if self.update_rms is not None:
            check("update_rms", self.update_rms, 0)

    def blend(self, old: Array, new: Array, decay: Any) -> Array:
        """Take up ``new``, every step: an average, or the sum of Algorithm 1."""
        return decay * old + (1 - decay) * new if self.accumulate == "ema" else old + decay * new

    def gather(self, old: Array, gradient: Array, scale: MomentumScale) -> Array:
        """Add one gradient of the running block, so that the block's end needs no buffer of its own.

        The decay of the old momentum, due at the end of a block, is done at its start: see ``open_block``.
        """
        share = (1 - scale.decay) / scale.period if self.accumulate == "ema" else scale.decay
        return old + share * gradient

    def open_block(self, momentum: Array, scale: MomentumScale) -> Array:
        """A slow momentum as the next block goes on with it, once its direction has been taken."""
        return scale.decay * momentum if self.accumulate == "ema" else momentum

    def corrected(self, moment: Array, decay: Any, count: Array) -> Array:
        """An average over the gradients there have been, without the zero it started from."""
        return moment / (1 - decay**count).astype(moment.real.dtype) if self.accumulate == "ema" else moment

    def weighted_sum(self, *directions: Array) -> Any:
        """The directions of all scales times their weights, added up."""
        return sum(one.weight * d for one, d in zip(self.scales, directions, strict=True))

    def orthogonalize(self, momentum: Array, view: MatrixView) -> Array:
        """NS of a leaf seen as matrices."""
        return view.from_matrices(self.newton_schulz.orthogonalize(view.to_matrices(momentum)))

    def direct(self, direction: Array, second: Array | None, view: MatrixView) -> Array:
        """From the sum of orthogonal directions to the step of one leaf (V corrected)."""
        if self.second_moment == "literal":
            assert second is not None
            step = direction / (jnp.sqrt(second) + self.eps)
        elif self.second_moment == "normalized":
            assert second is not None
            root = jnp.sqrt(view.to_matrices(second))
            step = direction / (view.from_matrices(over_rms(root)) + self.eps)
        else:
            step = direction
        rms = self.update_rms
        return step if rms is None else rms * view.from_matrices(over_rms(view.to_matrices(step)))


def squared(g: Array) -> Array:
    """``|g|^2``, of an entry that is finite but huge as large as can be summed: one such gradient must not last."""
    largest = float(jnp.finfo(g.dtype).max) ** 0.4
    return jnp.square(jnp.minimum(jnp.abs(g), largest))


def over_rms(x: Array) -> Array:
    """Every matrix of [..., rows, columns] divided by the root mean square of its entries; zero stays zero."""
    mean = jnp.mean(jnp.square(jnp.abs(x)), axis=(-2, -1), keepdims=True)
    return x * jnp.where(mean > 0, lax.rsqrt(jnp.where(mean > 0, mean, 1.0)), 0.0)
