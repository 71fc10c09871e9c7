"""M3, multi-scale momentum Muon (Eq. 75, Algorithm 1; SPEC 5.5): momenta of several time scales, each orthogonalised.

A *scale* is (period, decay, weight). The fast one, period 1, is Muon's momentum. A slow one of period f takes up f
gradients at a time and is orthogonalised once per f steps; its direction is constant inside such a block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hope_jax.errors import UserError
from hope_jax.levels import due
from hope_jax.optim.checks import check, check_whole, leaf_name
from hope_jax.optim.matrices import Labels, MatrixView, labels_or_default, matrix_views
from hope_jax.optim.newton_schulz import NewtonSchulz
from hope_jax.optim.precision import Cast, check_decay, with_state_dtype
from hope_jax.optim.recipe import recipe
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
class _Rules:
    """What one step does, whatever the tree: the arguments of ``scale_by_m3``."""

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
            step = direction / (view.from_matrices(_over_rms(root)) + self.eps)
        else:
            step = direction
        rms = self.update_rms
        return step if rms is None else rms * view.from_matrices(_over_rms(view.to_matrices(step)))


def _square(g: Array) -> Array:
    """``|g|^2``, of an entry that is finite but huge as large as can be summed: one such gradient must not last."""
    largest = float(jnp.finfo(g.dtype).max) ** 0.4
    return jnp.square(jnp.minimum(jnp.abs(g), largest))


def _over_rms(x: Array) -> Array:
    """Every matrix of [..., rows, columns] divided by the root mean square of its entries; zero stays zero."""
    mean = jnp.mean(jnp.square(jnp.abs(x)), axis=(-2, -1), keepdims=True)
    return x * jnp.where(mean > 0, lax.rsqrt(jnp.where(mean > 0, mean, 1.0)), 0.0)


def scale_by_m3(
    scales: tuple[MomentumScale, ...] = TWO_SCALES,
    second_decay: Any = 0.999,
    accumulate: Accumulate = "ema",
    second_moment: SecondMoment = "normalized",
    update_rms: Any = "default",
    eps: Any = None,
    newton_schulz: NewtonSchulz | None = None,
    matrices: Labels | None = None,
    state_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of M3, for matrices alone.

    With scale 1 fast (b1) and the others slow (period f, decay b, weight alpha), at step t = 1, 2, ...::

        if (t - 1) mod f == 0:  M2 <- b M2 + (1 - b) buf / f;  O2 <- NS(M2);  buf <- 0     # the block before
        M1 <- b1 M1 + (1 - b1) g;  V <- b2 V + (1 - b2) |g|^2;  buf <- buf + g             # M1, V bias-corrected
        U = (NS(M1) + alpha O2) / (R + eps),   R = sqrt(V) / rms(sqrt(V));   update = 0.2 U / rms(U)

    ``accumulate="sum", second_moment="literal"`` is Algorithm 1 as printed: ``M <- M + b g`` instead of averages, for
    V and M2 too, and ``update = (NS(M1) + alpha O2) / (sqrt(V) + eps)``. Its sums never forget, and the division makes
    the step inverse to the gradient's size, hence the other default. ``second_moment="none"`` leaves R out: with the
    fast scale alone that is Muon, up to the size of the step.

    R has root mean square 1, so ``eps = 1`` at most halves the step of a typical entry and lets one that never had a
    gradient (a pair of ReLU units that are never active together) move no more than all others. With a tiny eps those
    entries take the whole step: NS fills them, and U is divided by nearly nothing there.

    State per parameter at float32: 4 bytes for a fast scale, 8 for a slow one (buf is kept inside M2), 4 for V: 16 in
    all by default; Adam has 8. FLOPs per step: those of ``orthogonalize`` per fast scale, 1/f of that per slow one;
    under ``vmap`` of the whole optimizer slow ones are computed at every step, as a ``lax.cond`` is there a select.

    Args:
      scales: any number of ``MomentumScale``. Without a fast one nothing moves until the first block is over.
      second_decay: b2, 0 to below 1.
      accumulate: "ema" or "sum".
      second_moment: "normalized", "none" or "literal".
      update_rms: root mean square of the entries of each matrix's update; None: as it comes. Default: 0.2, about that
        of Adam, so that its learning rates serve; None with the literal second moment.
      eps: added to the divisor, above 0. None: 1 for "normalized", 1e-8 for "literal".
      newton_schulz: steps, method and precision; None: five quintic steps.
      matrices: ``params -> labels``, see ``matrices.py``; None: ``matrix_labels()``.
      state_dtype: see ``precision.with_state_dtype``; of the fast momenta and the directions. V and the slow momenta
        take up shares of about 0.001, which half precision would round away, so they stay as computed.

    Raises:
      UserError: an argument out of range; from ``init``, leaves that are no floating-point arrays or no matrices.
    """
    if isinstance(update_rms, str) and update_rms == "default":
        update_rms = None if second_moment == "literal" else 0.2
    if eps is None:
        eps = 1e-8 if second_moment == "literal" else 1.0
    ns = NewtonSchulz() if newton_schulz is None else newton_schulz
    rules = _Rules(scales, second_decay, accumulate, second_moment, update_rms, eps, ns)
    labels = labels_or_default(matrices)
    update = lambda updates, state, params=None: _step(rules, updates, state, matrix_views(updates, labels))  # noqa: E731
    transformation = optax.GradientTransformation(lambda params: _start(rules, params, labels), update)
    return with_state_dtype(transformation, state_dtype, _stored(rules, state_dtype))


def _stored(rules: _Rules, dtype: Any) -> Callable[[M3State, Cast], M3State]:
    """Which parts of the state may be narrow."""
    for scale in rules.scales:
        if scale.period == 1:
            check_decay("decay of the fast scale", scale.decay, dtype)

    def stored(state: M3State, cast: Cast) -> M3State:
        pairs = zip(rules.scales, state.momenta, strict=True)
        momenta = tuple(cast(m) if scale.period == 1 else m for scale, m in pairs)
        return state._replace(momenta=momenta, directions=cast(state.directions))

    return stored


def _start(rules: _Rules, params: Any, labels: Labels) -> M3State:
    def require(path: tuple[Any, ...], leaf: Any, view: MatrixView | None) -> None:
        if view is None:
            advice = "declare its axes (matrices=), use m3, which gives such leaves to AdamW, or optax.partition"
            raise UserError(f"scale_by_m3 got {leaf_name(path)} of shape {leaf.shape}, which is no matrix; {advice}")

    jax.tree_util.tree_map_with_path(require, params, matrix_views(params, labels))
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731  fresh ones, so that all can be donated
    momenta = tuple(zeros() for _ in rules.scales)
    slow = tuple(None if scale.period == 1 else zeros() for scale in rules.scales)
    second = None if rules.second_moment == "none" else jax.tree.map(lambda p: p.real, zeros())
    return M3State(jnp.zeros((), jnp.int32), momenta, slow, second)


def _step(rules: _Rules, gradients: Any, state: M3State, views: Any) -> tuple[Any, M3State]:
    count = jnp.asarray(optax.safe_increment(state.count))
    pairs = zip(rules.scales, state.momenta, state.directions, strict=True)
    moved = [_scale_step(rules, one, gradients, m, o, state.count, views) for one, m, o in pairs]
    total = lambda *ds: sum(one.weight * d for one, d in zip(rules.scales, ds, strict=True))  # noqa: E731
    direction = jax.tree.map(total, *(d for _, _, d in moved))
    second = state.second
    if second is None:
        steps = jax.tree.map(lambda d, v: rules.direct(d, None, v), direction, views)
    else:
        b = rules.second_decay
        second = jax.tree.map(lambda v, g: rules.blend(v, _square(g), b), second, gradients)
        direct = lambda d, v, view: rules.direct(d, rules.corrected(v, b, count), view)  # noqa: E731
        steps = jax.tree.map(direct, direction, second, views)
    return steps, M3State(count, tuple(m for m, _, _ in moved), tuple(o for _, o, _ in moved), second)


def _scale_step(
    rules: _Rules, scale: MomentumScale, gradients: Any, momenta: Any, directions: Any, done: Array, views: Any
) -> tuple[Any, Any, Any]:
    """Momenta, directions to keep (None for the fast scale) and directions now, after ``done`` steps."""
    if scale.period == 1:
        momenta = jax.tree.map(lambda m, g: rules.blend(m, g, scale.decay), momenta, gradients)
        now = lambda m, view: rules.orthogonalize(rules.corrected(m, scale.decay, done + 1), view)  # noqa: E731
        return momenta, None, jax.tree.map(now, momenta, views)

    def turn(momenta: Any, directions: Any) -> tuple[Any, Any]:
        taken = jax.tree.map(rules.orthogonalize, momenta, views)
        return jax.tree.map(lambda m: rules.open_block(m, scale), momenta), taken

    momenta, directions = lax.cond(due(done, scale.period), turn, lambda *same: same, momenta, directions)
    return jax.tree.map(lambda m, g: rules.gather(m, g, scale), momenta, gradients), directions, directions


def m3(
    learning_rate: optax.ScalarOrSchedule,
    scales: tuple[MomentumScale, ...] = TWO_SCALES,
    second_decay: Any = 0.999,
    accumulate: Accumulate = "ema",
    second_moment: SecondMoment = "normalized",
    update_rms: Any = "default",
    eps: Any = None,
    newton_schulz: NewtonSchulz | None = None,
    matrices: Labels | None = None,
    state_dtype: Any = None,
    *,
    weight_decay: Any = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``scale_by_m3`` for matrices and AdamW for everything else, with one learning rate and decoupled weight decay.

    ``fallback`` is a whole optimizer to take the place of that AdamW, which has optax's defaults and the same learning
    rate, decay and mask (its first moment has the state_dtype). For the rest see ``scale_by_m3`` and ``recipe``.
    """
    scale = scale_by_m3(
        scales, second_decay, accumulate, second_moment, update_rms, eps, newton_schulz, matrices, state_dtype
    )
    if fallback is None:
        narrow = lambda state, cast: state._replace(mu=cast(state.mu))  # noqa: E731
        adam = with_state_dtype(optax.scale_by_adam(), state_dtype, narrow)
        fallback = recipe(adam, learning_rate, weight_decay, mask)
    return recipe(scale, learning_rate, weight_decay, mask, fallback, matrices)
