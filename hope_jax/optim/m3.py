"""M3, multi-scale momentum Muon (Eq. 75, Algorithm 1; SPEC 5.5): momenta of several time scales, each orthogonalised.

A *scale* is (period, decay, weight). The fast one, period 1, is Muon's momentum. A slow one of period f takes up f
gradients at a time and is orthogonalised once per f steps; its direction is constant inside such a block. The
arithmetic of one leaf is in ``m3_rules.py``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hope_jax.errors import UserError
from hope_jax.levels import due
from hope_jax.optim.checks import leaf_name
from hope_jax.optim.m3_rules import TWO_SCALES, Accumulate, MomentumScale, Rules, SecondMoment, squared
from hope_jax.optim.matrices import Labels, MatrixView, labels_or_default, matrix_views
from hope_jax.optim.newton_schulz import NewtonSchulz
from hope_jax.optim.precision import Cast, check_decay, with_state_dtype
from hope_jax.optim.recipe import recipe
from hope_jax.types import Array


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
    newton_schulz = NewtonSchulz() if newton_schulz is None else newton_schulz
    rules = Rules(scales, second_decay, accumulate, second_moment, update_rms, eps, newton_schulz)
    transformation = _transformation(rules, labels_or_default(matrices))
    return with_state_dtype(transformation, state_dtype, _stored(rules, state_dtype))


def _transformation(rules: Rules, labels: Labels) -> optax.GradientTransformation:
    return optax.GradientTransformation(
        functools.partial(_start, rules, labels),
        lambda updates, state, params=None: _step(rules, labels, updates, state),
    )


def _stored(rules: Rules, dtype: Any) -> Callable[[M3State, Cast], M3State]:
    """Which parts of the state may be narrow."""
    for scale in rules.scales:
        if scale.period == 1:
            check_decay("decay of the fast scale", scale.decay, dtype)

    def stored(state: M3State, cast: Cast) -> M3State:
        pairs = zip(rules.scales, state.momenta, strict=True)
        momenta = tuple(cast(m) if scale.period == 1 else m for scale, m in pairs)
        return state._replace(momenta=momenta, directions=cast(state.directions))

    return stored


def _start(rules: Rules, labels: Labels, params: Any) -> M3State:
    def require(path: tuple[Any, ...], leaf: Any, view: MatrixView | None) -> None:
        if view is None:
            advice = "declare its axes (matrices=), use m3, which gives such leaves to AdamW, or optax.partition"
            raise UserError(f"scale_by_m3 got {leaf_name(path)} of shape {leaf.shape}, which is no matrix; {advice}")

    jax.tree_util.tree_map_with_path(require, params, matrix_views(params, labels))

    def zeros() -> Any:  # arrays of their own each time, so that all of them can be donated
        return jax.tree.map(jnp.zeros_like, params)

    momenta = tuple(zeros() for _ in rules.scales)
    slow = tuple(None if scale.period == 1 else zeros() for scale in rules.scales)
    second = None if rules.second_moment == "none" else jax.tree.map(lambda p: p.real, zeros())
    return M3State(jnp.zeros((), jnp.int32), momenta, slow, second)


def _step(rules: Rules, labels: Labels, gradients: Any, state: Any) -> tuple[Any, M3State]:
    views = matrix_views(gradients, labels)
    count = jnp.asarray(optax.safe_increment(state.count))
    pairs = zip(rules.scales, state.momenta, state.directions, strict=True)
    moved = [_scale_step(rules, one, gradients, m, o, state.count, views) for one, m, o in pairs]
    direction = jax.tree.map(rules.weighted_sum, *(d for _, _, d in moved))
    second = state.second
    if second is None:
        steps = jax.tree.map(lambda d, view: rules.direct(d, None, view), direction, views)
    else:
        b = rules.second_decay
        second = jax.tree.map(lambda v, g: rules.blend(v, squared(g), b), second, gradients)
        unbiased = jax.tree.map(lambda v: rules.corrected(v, b, count), second)
        steps = jax.tree.map(rules.direct, direction, unbiased, views)
    return steps, M3State(count, tuple(m for m, _, _ in moved), tuple(o for _, o, _ in moved), second)


def _scale_step(
    rules: Rules, scale: MomentumScale, gradients: Any, momenta: Any, directions: Any, done: Array, views: Any
) -> tuple[Any, Any, Any]:
    """Momenta, directions to keep (None for the fast scale) and directions now, after ``done`` steps."""
    if scale.period == 1:
        momenta = jax.tree.map(lambda m, g: rules.blend(m, g, scale.decay), momenta, gradients)
        unbiased = jax.tree.map(lambda m: rules.corrected(m, scale.decay, done + 1), momenta)
        return momenta, None, jax.tree.map(rules.orthogonalize, unbiased, views)

    def turn(momenta: Any, directions: Any) -> tuple[Any, Any]:
        taken = jax.tree.map(rules.orthogonalize, momenta, views)
        return jax.tree.map(lambda m: rules.open_block(m, scale), momenta), taken

    momenta, directions = lax.cond(due(done, scale.period), turn, lambda *same: same, momenta, directions)
    return jax.tree.map(lambda m, g: rules.gather(m, g, scale), momenta, gradients), directions, directions


def _narrow_first_moment(state: Any, cast: Cast) -> Any:
    return state._replace(mu=cast(state.mu))


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
        adam = with_state_dtype(optax.scale_by_adam(), state_dtype, _narrow_first_moment)
        fallback = recipe(adam, learning_rate, weight_decay, mask)
    return recipe(scale, learning_rate, weight_decay, mask, fallback, matrices)
