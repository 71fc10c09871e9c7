"""Two small problems that momentum is bad at: a valley that winds, and tasks one after another (SPEC 5.7).

Parameters are one column [n, 1], as a Flax kernel with one output, so that matrix optimizers apply.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hope_jax.types import Array, Float

Make = Callable[[Any, Any], optax.GradientTransformation]
"""(learning rate, second hyper-parameter) -> optimizer; both may be traced."""


START = (-3.5, 2.0)
K, AMPLITUDE, FREQUENCY = 10.0, 0.5, 5.0
"""Of the valley: where to start in it, and its form."""


def height(point: Float[Array, "*points 2"]) -> Float[Array, "*points"]:
    """``psi(r, th) = r^2 + k c^2``, ``c = r - th + A sin(w r)`` (Eq. 53): a valley that winds; least at 0."""
    r, theta = point[..., 0], point[..., 1]
    return r**2 + K * (r - theta + AMPLITUDE * jnp.sin(FREQUENCY * r)) ** 2


def slope(point: Float[Array, "2"]) -> Float[Array, "2"]:
    """The gradient of psi."""
    r, theta = point
    c = r - theta + AMPLITUDE * jnp.sin(FREQUENCY * r)
    inner = 1 + AMPLITUDE * FREQUENCY * jnp.cos(FREQUENCY * r)
    return jnp.stack([2 * r + 2 * K * c * inner, -2 * K * c])


def descend(
    make: Make, rates: Float[Array, " S"], seconds: Float[Array, " S"], steps: int
) -> Float[Array, "S steps 2"]:
    """The points after each step from ``START``, for S settings of an optimizer side by side."""

    def run(rate: Array, second: Array) -> Array:
        tx = make(rate, second)

        def step(carry: Any, _: None) -> tuple[Any, Array]:
            point, state = carry
            updates, state = tx.update(slope(point[:, 0])[:, None], state, point)
            point += updates
            return (point, state), point[:, 0]

        start = jnp.asarray(START, rates.dtype)[:, None]
        return jax.lax.scan(step, (start, tx.init(start)), None, length=steps)[1]

    return jax.jit(jax.vmap(run))(rates, seconds)


class Stream(NamedTuple):
    """Regression tasks in sequence, E seeds of them; every example is met once.

    Attributes:
      x: inputs, ``+-U(0.5, 1.5) u_i`` in task i, with orthonormal u_i.
      y: ``c_i (x . u_i)``.
      directions: u_i.
      answers: c_i, normal(0, 1).
    """

    x: Float[Array, "E tasks steps n"]
    y: Float[Array, "E tasks steps"]
    directions: Float[Array, "E tasks n"]
    answers: Float[Array, "E tasks"]


def stream(seeds: int, tasks: int, steps: int, size: int) -> Stream:
    """Orthogonal tasks (Eq. 45), of the seeds 0, 1, ...; in the present default floating-point type."""

    def one(seed: int) -> tuple[np.ndarray, ...]:
        draw = np.random.default_rng(seed)
        directions = np.linalg.qr(draw.normal(size=(size, tasks)))[0].T
        answers = draw.normal(size=tasks)
        length = draw.uniform(0.5, 1.5, (tasks, steps)) * draw.choice([-1.0, 1.0], (tasks, steps))
        return length[..., None] * directions[:, None], length * answers[:, None], directions, answers

    return Stream(*(jnp.asarray(np.stack(part), float) for part in zip(*map(one, range(seeds)), strict=True)))


MEAN_SQUARE = 1 + 1 / 12
"""Of a length drawn from U(0.5, 1.5)."""


def learn(
    tasks: Stream, make: Make, rates: Float[Array, " S"], seconds: Float[Array, " S"]
) -> Float[Array, "S E tasks tasks"]:
    """Expected loss of every task (last axis) after each task was learned, for S settings and E seeds."""

    def run(rate: Array, second: Array, tasks: Stream) -> Array:
        tx = make(rate, second)

        def step(carry: Any, example: tuple[Array, Array]) -> tuple[Any, None]:
            (w, state), (x, y) = carry, example
            updates, state = tx.update(x[:, None] * (x @ w[:, 0] - y), state, w)
            return (optax.apply_updates(w, updates), state), None

        def task(carry: Any, examples: tuple[Array, Array]) -> tuple[Any, Array]:
            (w, state), _ = jax.lax.scan(step, carry, examples)
            return (w, state), MEAN_SQUARE / 2 * (tasks.directions @ w[:, 0] - tasks.answers) ** 2

        start = jnp.zeros((tasks.x.shape[-1], 1), tasks.x.dtype)
        return jax.lax.scan(task, (start, tx.init(start)), (tasks.x, tasks.y))[1]

    return jax.jit(jax.vmap(jax.vmap(run, (None, None, 0)), (0, 0, None)))(rates, seconds, tasks)
