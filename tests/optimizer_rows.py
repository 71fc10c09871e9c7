"""The optimizers of the table: one row each, and the tree, gradients and loop that every property uses."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax import optim
from hope_jax.optim import MomentumScale, by_level

LEVELS = {"static": 1, "level_0": 2, "level_1": 4}
ALL_AT_ONCE = dict.fromkeys(LEVELS, 1)


@dataclass(frozen=True)
class Row:
    """An optimizer and what the table needs to know of it.

    Attributes:
      make: the optimizer at a learning rate, a number, a traced array or a schedule.
      limit: the same where it should be a known optimizer, and that optimizer.
      rate: a learning rate that reaches the minimum of a small quadratic in ``steps`` updates, to ``tolerance``.
      valley: learning rate and updates that bring a Rosenbrock function from 24 below 0.1.
      wide_state: bfloat16 parameters have float32 state.
      complex: it is defined for complex parameters (optax.MultiSteps, hence a level with n > 1, is not).
    """

    make: Callable[[Any], optax.GradientTransformation]
    limit: tuple[optax.GradientTransformation, optax.GradientTransformation]
    rate: Any
    steps: int = 400
    tolerance: float = 1e-3
    valley: tuple[Any, int] = (1e-3, 2000)
    wide_state: bool = True
    complex: bool = True


def levels(every: Mapping[str, int], optimizer: Callable[[Any], optax.GradientTransformation]) -> Callable:
    """``by_level`` with the same optimizer on every level, as a function of the learning rate or its schedule."""

    def of(rate: Any, n: int) -> Any:
        return (lambda count: rate(count * n + n - 1)) if callable(rate) else rate

    return lambda rate: by_level(lambda n: optimizer(of(rate, n)), every)


def adamw(rate: Any) -> optax.GradientTransformation:
    """AdamW that also decays, which sets it apart from Adam."""
    return optax.adamw(rate, weight_decay=1e-3)


def momentum(rate: Any) -> optax.GradientTransformation:
    """Gradient descent with momentum."""
    return optax.sgd(rate, momentum=0.9)


MOMENTUM = momentum(1e-2)


def limit(optimizer: Callable[[Any], optax.GradientTransformation]):
    """All levels at once are no levels."""
    return levels(ALL_AT_ONCE, optimizer)(1e-2), optimizer(1e-2)


def matrix_or_not(params: Any) -> Any:
    """Labels of the table's tree and of the other problems: kernels with two axes are matrices."""

    def kernel(path, p):
        return "matrix" if p.ndim == 2 and path[-1].key == "kernel" else "adamw"

    return jax.tree_util.tree_map_with_path(kernel, params)


def all_matrices(params: Any) -> Any:
    """What optax's Muon wants to be told."""
    return jax.tree.map(lambda _: optim.MuonDimensionNumbers(), params)


def known_muon(scale: Callable[[Any], Any]) -> optax.GradientTransformation:
    """optax's Muon without Nesterov and at another step size, and its AdamW."""
    ours = optax.chain(
        optax.contrib.scale_by_muon(beta=0.9, nesterov=False, weight_dimension_numbers=all_matrices),
        optax.stateless_with_tree_map(lambda u, _: scale(u)),
        optax.scale(-1e-2),
    )
    return optax.partition({"matrix": ours, "adamw": optax.adamw(1e-2, weight_decay=0.0)}, matrix_or_not)


def to_rms(u):
    """0.2 root mean square, as M3 steps."""
    return 0.2 * u / jnp.sqrt(jnp.mean(u * u))


MUON = known_muon(to_rms)


def muon(rate: Any) -> optax.GradientTransformation:
    """Muon as a setting of generalized momentum."""
    rest = optax.adamw(rate, weight_decay=0.0)
    return optim.generalized_momentum(rate, output=optim.muon_step, fallback=rest)


def m3(rate: Any, slow: float = 1.0, second: str = "normalized") -> optax.GradientTransformation:
    """M3 with a short slow period."""
    return optim.m3(rate, (MomentumScale(1, 0.9), MomentumScale(3, 0.9, slow)), second_moment=second)


def three_scales(rate: Any, slow: float = 1.0) -> optax.GradientTransformation:
    """M3 with three momenta, weight decay (with the slow ones) and no second moment."""
    scales = (MomentumScale(1, 0.9), MomentumScale(2, 0.8, 0.5 * slow), MomentumScale(5, 0.5, 0.3 * slow))
    return optim.m3(rate, scales, second_moment="none", weight_decay=1e-4 * slow)


def delta(form: str, erase: float = 0.1) -> Callable:
    """Delta momentum of one form."""
    return lambda rate: optim.delta_momentum(rate, 0.9, erase, form)


def keyed(rate: Any, objective: Any = optim.l2) -> optax.GradientTransformation:
    """Generalized momentum whose keys are the gradients; the small inner rate keeps steep slopes stable."""
    return optim.generalized_momentum(1e5 * rate, objective, optim.KeyedMemory(), retention=0.9, rate=1e-5)


def preconditioned(rate: Any, inner: float = 0.1) -> optax.GradientTransformation:
    """Momentum with a learned preconditioner."""
    return optim.preconditioned_momentum(rate, 0.9, optim.learned_preconditioner(inner))


def deep(memory: Any = "linear", inner: float | None = None) -> Callable:
    """Deep momentum: a linear memory, or a small network."""
    return lambda rate: optim.dmgd(rate, memory, inner_rate=inner)


NETWORK = optim.MLPMemory(hidden=8)
FADING = optax.linear_schedule(1e-1, 0.0, 400)  # steps of one size need to fade
SLOWLY = optax.linear_schedule(1e-1, 0.0, 1200)
VALLEY = (optax.linear_schedule(1e-1, 0.0, 2000), 2000)
SIGNS = optax.chain(optax.stateless_with_tree_map(lambda g, _: jnp.sign(g)), MOMENTUM)
ROWS = {
    "adamw, all at once": Row(
        levels(ALL_AT_ONCE, adamw), limit(adamw), 3e-2, tolerance=1e-2, valley=VALLEY, wide_state=False
    ),
    "adamw, levels": Row(
        levels(LEVELS, adamw), limit(adamw), 3e-2, 1200, 1e-2, valley=VALLEY, wide_state=False, complex=False
    ),
    "momentum, levels": Row(levels(LEVELS, momentum), limit(momentum), 3e-2, 1200, wide_state=False, complex=False),
    "m3": Row(m3, (m3(1e-2, slow=0.0, second="none"), MUON), FADING, tolerance=2e-2, valley=VALLEY),
    "m3, three scales": Row(three_scales, (three_scales(1e-2, 0.0), MUON), FADING, tolerance=2e-2, valley=VALLEY),
    "m3, levels": Row(levels(LEVELS, m3), limit(m3), SLOWLY, 1200, tolerance=2e-2, valley=VALLEY, complex=False),
    "muon": Row(
        muon, (muon(1e-2), known_muon(lambda u: 0.2 * max(u.shape) ** 0.5 * u)), FADING, tolerance=2e-2, valley=VALLEY
    ),
    "generalized": Row(
        lambda rate: optim.generalized_momentum(rate), (optim.generalized_momentum(1e-2), MOMENTUM), 3e-2
    ),
    "generalized, keyed": Row(lambda rate: keyed(rate), (keyed(1e-2, optim.dot), MOMENTUM), 3e-2),
    "preconditioned": Row(preconditioned, (preconditioned(1e-2, 1.0), SIGNS), FADING, tolerance=2e-2, valley=VALLEY),
    "delta": Row(delta("gram"), (delta("gram", 0.0)(1e-2), MOMENTUM), 3e-2),
    "delta, scalar": Row(delta("scalar"), (delta("scalar", 0.0)(1e-2), MOMENTUM), 3e-2),
    "delta, levels": Row(levels(LEVELS, delta("gram")), limit(delta("gram")), 3e-2, 1200, complex=False),
    "dmgd, linear": Row(deep(), (deep()(1e-2), MOMENTUM), 3e-2),
    "dmgd, mlp": Row(
        deep(NETWORK), (deep(NETWORK, 0.0)(1e-2), optax.sgd(1e-2)), 3e-2, valley=(1e-3, 4000), complex=False
    ),
}
# Four of these are combinations of other rows, one is the long form of another.
SLOW = ("m3, levels", "delta, levels", "momentum, levels", "adamw, all at once", "m3, three scales")
# What neither wrappers nor devices can tell from another row: it has another function in it (an output, the form of an
# erase, a linear memory), and the same kind of state and of update.
ALIKE = ("muon", "generalized", "delta, scalar", "dmgd, linear")


def table_of(slow: tuple[str, ...]) -> Any:
    """A test for every row, those in ``slow`` marked so."""
    cases = (pytest.param(row, marks=pytest.mark.slow if name in slow else (), id=name) for name, row in ROWS.items())
    return pytest.mark.parametrize("row", list(cases))


table = table_of(SLOW)
kinds = table_of((*SLOW, *ALIKE))
wrapped = table_of((*SLOW, *ALIKE, "dmgd, mlp"))  # the last compiles slowly


def parameters(dtype: Any = jnp.float32):
    """A tree like a model's, one leaf per level; the first axis can be cut into eight."""
    shapes = {"embedding": (16, 3), "ffn": {"level_0": {"kernel": (8, 2)}, "level_1": {"kernel": (8,)}}}
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(draw.normal(size=s), dtype), shapes, is_leaf=lambda s: type(s) is tuple)


def gradient(step: int, like: Any):
    """Gradient number ``step``, of the shapes, dtypes and placement of ``like``."""
    draw = np.random.default_rng(step + 1)
    return jax.tree.map(lambda p: jnp.zeros_like(p) + draw.normal(size=p.shape).astype(p.dtype), like)


@functools.cache
def compiled(make: Callable[[Any], optax.GradientTransformation]) -> optax.GradientTransformationExtraArgs:
    """A row's optimizer at a learning rate of 0.01; its update is one compiled program, whatever it is wrapped in."""
    tx = optax.with_extra_args_support(make(1e-2))
    return optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))


def walk(tx: Any, params: Any, steps: int = 8, given: Callable[[int, Any], Any] = gradient) -> tuple[Any, Any]:
    """Parameters and state after so many updates by the gradients ``given(step, params)``."""
    state = tx.init(params)
    for step in range(steps):
        updates, state = tx.update(given(step, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def run(tx: optax.GradientTransformation, params: Any, steps: int = 8) -> tuple[Any, Any, Any]:
    """Parameters and state after so many compiled updates, and the compiled update."""
    update = jax.jit(optax.with_extra_args_support(tx).update)
    return *walk(optax.GradientTransformation(tx.init, update), params, steps), update


@functools.cache
def plain_run(make: Callable[[Any], optax.GradientTransformation], steps: int = 8) -> tuple[Any, Any, int]:
    """Parameters and state of a ``compiled`` row after so many updates, and how many programs that took."""
    tx = compiled(make)
    before = tx.update._cache_size()
    params, state = walk(tx, parameters(), steps)
    return params, state, tx.update._cache_size() - before


def program(tx: Any, params: Any, **extra: Any) -> str:
    """The whole computation of an update, as text: where two are equal, so are all results."""
    tx = optax.with_extra_args_support(tx)
    state = jax.eval_shape(tx.init, params)
    jaxpr = jax.make_jaxpr(lambda *given: tx.update(*given, **extra))(params, state, params)
    return re.sub(r"0x[0-9a-f]+", "", str(jaxpr))


@functools.cache
def descend(
    make: Callable[[Any], optax.GradientTransformation], rate: Any, steps: int, loss: Callable[[Any], Any], start: Any
) -> Any:
    """Parameters after so many updates along the gradient of a loss, from ``start()``, in one compiled scan."""
    tx = optax.with_extra_args_support(make(rate))

    @jax.jit
    def go(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]

    return go(start())
