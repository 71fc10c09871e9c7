"""M3, multi-scale momentum Muon (Eq. 75, Algorithm 1; SPEC 5.5): momenta of several time scales, each orthogonalised.

A *scale* is (period, decay, weight). The fast one, period 1, is Muon's momentum. A slow one of period f takes up f
gradients at a time and is orthogonalised once per f steps; its direction is constant inside such a block. The
arithmetic is in ``m3_rules.py``.
"""

from typing import Any

import optax

from hope_jax.optim.m3_rules import Accumulate, MomentumScale, Rules, SecondMoment
from hope_jax.optim.matrices import Labels, labels_or_default
from hope_jax.optim.newton_schulz import NewtonSchulz
from hope_jax.optim.recipe import recipe, with_state_dtype

TWO_SCALES = (MomentumScale(1, 0.9), MomentumScale(100, 0.9))


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
    """The direction of M3, for matrices alone: other parameters are refused.

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
      state_dtype: see ``with_state_dtype``; of the fast momenta and the directions. V and the slow momenta take up
        shares of about 0.001, which half precision would round away, so they stay as computed.
    """
    literal = second_moment == "literal"
    if isinstance(update_rms, str) and update_rms == "default":
        update_rms = None if literal else 0.2
    if eps is None:
        eps = 1e-8 if literal else 1.0
    settings = scales, second_decay, accumulate, second_moment, update_rms, eps
    iteration = NewtonSchulz() if newton_schulz is None else newton_schulz
    rules = Rules(*settings, iteration, labels_or_default(matrices), state_dtype)
    return with_state_dtype(optax.GradientTransformation(rules.init, rules.update), state_dtype, rules.stored)


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
        adam = with_state_dtype(optax.scale_by_adam(), state_dtype, lambda s, cast: s._replace(mu=cast(s.mu)))
        fallback = recipe(adam, learning_rate, weight_decay, mask)
    return recipe(scale, learning_rate, weight_decay, mask, fallback, matrices)
