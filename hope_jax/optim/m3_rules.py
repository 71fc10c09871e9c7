"""The arithmetic of M3: averages, orthogonal directions of several time scales, the size of the step (SPEC 5.5)."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hope_jax.errors import UserError, check_choices, whole
from hope_jax.levels import due
from hope_jax.optim.checks import check, check_decay, leaf_name
from hope_jax.optim.matrices import Labels, MatrixView, matrix_views
from hope_jax.optim.newton_schulz import NewtonSchulz
from hope_jax.optim.recipe import Cast
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
        whole("period", self.period, 1, "optimizer steps")
        check("decay", self.decay, 0, 1, open_high=False)
        check("weight", self.weight, -float("inf"))


class M3State(NamedTuple):
    """Trees shaped like the matrices among the parameters; one entry per scale where a tuple.

    Attributes:
      count: steps done.
      momenta: what every scale has taken up. A slow scale holds the gradients of its running block here too.
      directions: the orthogonalised momentum of slow scales, constant inside a block; None for the fast ones.
      second: V, real; None without a second moment.
    """

    count: Array
    momenta: tuple[Any, ...]
    directions: tuple[Any, ...]
    second: Any


@dataclass(frozen=True)
class Rules:
    """``scale_by_m3`` at work: its arguments, checked, and what they do."""

    scales: Any
    second_decay: Any
    accumulate: Accumulate
    second_moment: SecondMoment
    update_rms: Any
    eps: Any
    newton_schulz: NewtonSchulz
    labels: Labels
    state_dtype: Any

    def __post_init__(self) -> None:
        if not isinstance(self.newton_schulz, NewtonSchulz):
            raise UserError(f"newton_schulz is {self.newton_schulz!r}; expected NewtonSchulz(steps, method, dtype)")
        check_choices(self)
        several = isinstance(self.scales, tuple | list) and len(self.scales) > 0
        if not (several and all(isinstance(scale, MomentumScale) for scale in self.scales)):
            raise UserError(f"scales is {self.scales!r}; expected a tuple of MomentumScale(period, decay, weight)")
        for i, scale in enumerate(self.scales, start=1):
            check(f"decay of scale {i}", scale.decay, 0, 1, open_high=self.accumulate == "ema")
            if scale.period == 1:
                check_decay("decay of the fast scale", scale.decay, self.state_dtype)
        check("second_decay", self.second_decay, 0, 1, open_high=self.accumulate == "ema")
        check("eps", self.eps, 0, open_low=True)
        if self.update_rms is not None:
            check("update_rms", self.update_rms, 0)

    def init(self, params: Any) -> M3State:
        """Nothing taken up yet. Raises UserError for a leaf that is no matrix."""

        def require(path: tuple[Any, ...], leaf: Any, view: MatrixView | None) -> None:
            if view is None:
                how = "declare its axes (matrices=), use m3, which gives such leaves to AdamW, or optax.partition"
                raise UserError(f"scale_by_m3 got {leaf_name(path)} of shape {leaf.shape}, which is no matrix; {how}")

        jax.tree_util.tree_map_with_path(require, params, matrix_views(params, self.labels))

        def zeros() -> Any:  # arrays of their own each time, so that all of them can be donated
            return jax.tree.map(jnp.zeros_like, params)

        momenta = tuple(zeros() for _ in self.scales)
        slow = tuple(None if scale.period == 1 else zeros() for scale in self.scales)
        second = None if self.second_moment == "none" else jax.tree.map(lambda p: p.real, zeros())
        return M3State(jnp.zeros((), jnp.int32), momenta, slow, second)

    def update(self, updates: Any, state: Any, params: Any = None) -> tuple[Any, M3State]:
        """The steps and the state after them."""
        views, count = matrix_views(updates, self.labels), jnp.asarray(optax.safe_increment(state.count))
        each = zip(self.scales, state.momenta, state.directions, strict=True)
        moved = [self._moved(*one, updates, state.count, views) for one in each]
        momenta, kept, directions = zip(*moved, strict=True)
        second, unbiased = None, jax.tree.map(lambda _: None, updates)
        if state.second is not None:
            b = self.second_decay
            second = jax.tree.map(lambda v, g: self._blend(v, _squared(g), b), state.second, updates)
            unbiased = jax.tree.map(lambda v: self._corrected(v, b, count), second)

        def step(view: MatrixView, second: Array | None, *directions: Array) -> Array:
            total = sum(scale.weight * d for scale, d in zip(self.scales, directions, strict=True))
            return self._sized(jnp.asarray(total), second, view)

        return jax.tree.map(step, views, unbiased, *directions), M3State(count, momenta, kept, second)

    def stored(self, state: M3State, cast: Cast) -> M3State:
        """The state between two steps: fast momenta and directions may be narrow."""
        pairs = zip(self.scales, state.momenta, strict=True)
        momenta = tuple(cast(m) if scale.period == 1 else m for scale, m in pairs)
        return state._replace(momenta=momenta, directions=cast(state.directions))

    def _moved(
        self, scale: MomentumScale, momenta: Any, directions: Any, gradients: Any, done: Array, views: Any
    ) -> tuple[Any, Any, Any]:
        """Momenta, directions to keep (None for the fast scale) and directions now, after ``done`` steps."""
        averaging = self.accumulate == "ema"
        if scale.period == 1:
            momenta = jax.tree.map(lambda m, g: self._blend(m, g, scale.decay), momenta, gradients)
            unbiased = jax.tree.map(lambda m: self._corrected(m, scale.decay, done + 1), momenta)
            return momenta, None, jax.tree.map(self._orthogonalize, unbiased, views)

        def turn(momenta: Any, _: Any) -> tuple[Any, Any]:
            taken = jax.tree.map(self._orthogonalize, momenta, views)
            # The decay that is due at the end of a block: its gradients are then added one by one, without a buffer.
            return jax.tree.map(lambda m: scale.decay * m if averaging else m, momenta), taken

        momenta, directions = lax.cond(due(done, scale.period), turn, lambda *same: same, momenta, directions)
        share = (1 - scale.decay) / scale.period if averaging else scale.decay
        return jax.tree.map(lambda m, g: m + share * g, momenta, gradients), directions, directions

    def _blend(self, old: Array, new: Array, decay: Any) -> Array:
        """Take up ``new``, every step: an average, or the sum of Algorithm 1."""
        return decay * old + (1 - decay) * new if self.accumulate == "ema" else old + decay * new

    def _corrected(self, moment: Array, decay: Any, count: Array) -> Array:
        """An average over the gradients there have been, without the zero it started from."""
        return moment / (1 - decay**count).astype(moment.real.dtype) if self.accumulate == "ema" else moment

    def _orthogonalize(self, momentum: Array, view: MatrixView) -> Array:
        return view.from_matrices(self.newton_schulz.orthogonalize(view.to_matrices(momentum)))

    def _sized(self, direction: Array, second: Array | None, view: MatrixView) -> Array:
        """From the sum of orthogonal directions to the step of one leaf (V corrected)."""
        if second is not None:
            root = jnp.sqrt(second)
            divisor = _over_rms(root, view) if self.second_moment == "normalized" else root
            direction = direction / (divisor + self.eps)
        return direction if self.update_rms is None else self.update_rms * _over_rms(direction, view)


def _squared(g: Array) -> Array:
    """``|g|^2``, of an entry that is finite but huge as large as can be summed: one such gradient must not last."""
    largest = float(jnp.finfo(g.dtype).max) ** 0.4
    return jnp.square(jnp.minimum(jnp.abs(g), largest))


def _over_rms(leaf: Array, view: MatrixView) -> Array:
    """Every matrix of a leaf divided by the root mean square of its entries; zero stays zero."""
    x = view.to_matrices(leaf)
    mean = jnp.mean(jnp.square(jnp.abs(x)), axis=(-2, -1), keepdims=True)
    return view.from_matrices(x * jnp.where(mean > 0, lax.rsqrt(jnp.where(mean > 0, mean, 1.0)), 0.0))
