"""Delta gradient descent against its definition, and mistakes in it and in the layer of ``test_delta_dense.py``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax import optim
from hope_jax.errors import UserError
from hope_jax.optim import dgd_update, ggd_step
from hope_jax.optim.dgd import DeltaDot

FORMS = ["exact", "cheap", "spectral"]
ROWS_IN_OUT = [(1, 4, 3), (3, 8, 2), (8, 3, 5), (4, 4, 4)]
step = functools.partial(jax.jit, static_argnames="form")(dgd_update)


def problem(rows, inputs, outputs, scale=1.7):
    """Kernel [in, out], X [rows, in], dY [rows, out] with keys far from unit length."""
    draw = np.random.default_rng(rows * 100 + inputs)
    shapes = (inputs, outputs), (rows, inputs), (rows, outputs)
    return tuple(scale * draw.normal(size=shape) for shape in shapes)


def minimiser(kernel, x, dy, rate):
    """argmin_K 1/2 ||X K - U||^2 + 1/(2 rate) ||K - K_t||^2, U = -dY, by least squares on the stacked equations."""
    identity = np.eye(kernel.shape[0]) / np.sqrt(rate)
    stacked = np.concatenate([x, identity]), np.concatenate([-dy, identity @ kernel])
    return np.linalg.lstsq(*stacked, rcond=None)[0]


def printed(weights, x, gradient, rate):
    """Eq. 56-57 for one column x, W [out, in], with the eta' that is right for any length of x."""
    r = rate / (1 + rate * x @ x)
    return weights @ (np.eye(len(x)) - r * np.outer(x, x)) - r * np.outer(gradient, x)


@pytest.mark.parametrize("shape", ROWS_IN_OUT, ids=str)
def test_the_exact_form_is_the_minimiser_on_both_sides_of_woodbury(shape, x64):
    kernel, x, dy = problem(*shape)
    for rate in (0.05, 3.0):
        expected = minimiser(kernel, x, dy, rate)
        np.testing.assert_allclose(step(kernel, x, dy, rate), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(256, 64, 8), (48, 64, 8)], ids=str)
def test_equal_rows_do_not_break_the_exact_form_in_float32(shape):
    kernel, x, dy = problem(*shape, scale=1.0)
    x = np.repeat(x[:4], shape[0] // 4, axis=0)
    for rate in (1.0, 100.0):
        expected = minimiser(kernel, x, dy, rate)
        found = step(*map(np.float32, (kernel, x, dy)), rate)
        assert np.linalg.norm(found - expected) < 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("form", FORMS)
def test_one_row_is_the_printed_equation_in_the_flax_orientation(form, x64):
    kernel, x, dy = problem(1, 4, 3)
    expected = printed(kernel.T, x[0], dy[0], 0.7).T
    np.testing.assert_allclose(step(kernel, x, dy, 0.7, form=form), expected, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(step(kernel, x[0], dy[0], 0.7, form=form), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(3, 8, 2), (8, 3, 5)], ids=str)
@pytest.mark.parametrize("form", ["cheap", "spectral"])
def test_the_short_forms_are_one_gradient_step_and_never_raise_the_objective(form, shape, x64):
    kernel, x, dy = problem(*shape)
    for rate in (1e-2, 1.0, 1e4):
        size = np.sum(x * x) if form == "cheap" else np.linalg.norm(x, 2) ** 2
        length = rate / (1 + rate * size)

        def objective(k, rate=rate):
            return np.sum((x @ k + dy) ** 2) / 2 + np.sum((k - kernel) ** 2) / (2 * rate)

        moved = step(kernel, x, dy, rate, form=form)
        slope = x.T @ (x @ kernel + dy)
        np.testing.assert_allclose(moved, kernel - length * slope, rtol=1e-10, atol=1e-10)
        assert objective(moved) < objective(kernel)


@pytest.mark.parametrize("form", FORMS)
def test_without_surprise_the_kernel_shrinks_along_its_inputs_and_nowhere_else(form, x64):
    kernel, x, dy = problem(3, 8, 2)
    moved = np.asarray(step(kernel, x, 0 * dy, 1e6, form=form))
    seen = np.linalg.pinv(x) @ x
    np.testing.assert_allclose(moved - seen @ moved, kernel - seen @ kernel, atol=1e-9)
    assert np.linalg.norm(x @ moved) < (1e-4 if form == "exact" else 1.0) * np.linalg.norm(x @ kernel)


@pytest.mark.parametrize("form", FORMS)
def test_leading_axes_are_rows_and_bfloat16_stays_bfloat16(form):
    kernel, x, dy = (np.asarray(a, jnp.bfloat16) for a in problem(8, 3, 5))
    moved = step(kernel, x.reshape(2, 4, 3), dy.reshape(2, 4, 5), np.float32(0.3), form=form)
    expected = step(*(a.astype(np.float32) for a in (kernel, x, dy)), 0.3, form=form)
    assert moved.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(moved, np.float32), expected, rtol=1e-2, atol=1e-2)


def proximal(rate):
    return lambda w, old: jnp.sum((w - old) ** 2) / (2 * rate)


def test_generalized_descent_with_a_dot_product_is_gradient_descent_and_with_l2_is_delta_descent(x64):
    weights, x, dy = (a.T for a in problem(1, 4, 3))

    def surprise(w, x):
        return -dy - 0 * (w @ x)

    def dot(w, x, u):
        return -jnp.sum((w @ x) * u)

    def l2(w, x, u):
        return jnp.sum((w @ x - u) ** 2) / 2

    # The proximal term is least at W - rate * grad: one step of length `rate` is there.
    found = ggd_step(weights, x, surprise, dot, proximal(0.3), rate=0.3, steps=1)
    np.testing.assert_allclose(found, weights - 0.3 * dy @ x.T, rtol=1e-12, atol=1e-12)
    found = ggd_step(weights, x, surprise, l2, proximal(0.3), rate=0.06, steps=400)
    np.testing.assert_allclose(found, printed(weights, x[:, 0], dy[:, 0], 0.3), rtol=1e-8, atol=1e-8)


def test_the_target_of_generalized_descent_is_taken_at_the_old_weights(x64):
    def l2(w, x, u):
        return jnp.sum((w * x - u) ** 2) / 2

    w, x = jnp.float64(2.0), jnp.float64(1.5)
    found = ggd_step(w, x, lambda w, x: 3 * w * x, l2, proximal(0.5), rate=0.1, steps=500)
    np.testing.assert_allclose(found, (x * 3 * w * x + w / 0.5) / (x * x + 1 / 0.5), rtol=1e-9)


MISTAKES = {
    "form is 'fast'": lambda k, x, dy: dgd_update(k, x, dy, 0.1, form="fast"),
    "rate is -1": lambda k, x, dy: dgd_update(k, x, dy, -1.0),
    "rate is inf; expected 0 or more": lambda k, x, dy: dgd_update(k, x, dy, float("inf")),
    "rate is nan": lambda k, x, dy: dgd_update(k, x, dy, float("nan")),
    "rate is -0.5": lambda k, x, dy: dgd_update(k, x, dy, jnp.float32(-0.5)),
    "kernel has dtype int32; expected a real": lambda k, x, dy: dgd_update(k.astype(jnp.int32), x, dy, 0.1),
    "inputs has dtype complex64": lambda k, x, dy: dgd_update(k, x.astype(jnp.complex64), dy, 0.1),
    "kernel has shape (3,)": lambda k, x, dy: dgd_update(k[0], x, dy, 0.1),
    "inputs have shape (8, 2)": lambda k, x, dy: dgd_update(k, x[:, :2], dy, 0.1),
    "output_gradients have shape (8, 4); expected (8, 3)": lambda k, x, dy: dgd_update(k, x, jnp.ones((8, 4)), 0.1),
    "steps is 0": lambda k, x, dy: ggd_step(k, x, None, None, None, rate=0.1, steps=0),
    "steps is 2.5": lambda k, x, dy: ggd_step(k, x, None, None, None, rate=0.1, steps=2.5),
    "rate is inf; expected above 0 and finite": lambda k, x, dy: ggd_step(k, x, None, None, None, float("inf"), 3),
    "strength is '1'; expected a number": lambda *_: optim.delta_dense(3, strength="1"),
    "rows is 2.5": lambda *_: optim.delta_dense(3, rows=2.5),
    "strength is -1": lambda *_: optim.delta_dense(3, strength=-1.0),
    "strength is inf": lambda *_: optim.delta_dense(3, strength=float("inf")),
    "rows is 0": lambda *_: optim.delta_dense(3, rows=0),
    "leave out ['dot_general']": lambda *_: optim.delta_dense(3, dot_general=jax.lax.dot_general),
    "kernel has batch axes": lambda k, x, dy: DeltaDot()(
        jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5)), (((2,), (1,)), ((0,), (0,)))
    ),
}


@pytest.mark.parametrize("expected", MISTAKES)
def test_a_mistake_is_one_sentence(expected, untyped):
    kernel, x, dy = jnp.ones((4, 3)), jnp.ones((8, 4)), jnp.ones((8, 3))
    with pytest.raises(UserError) as error:
        MISTAKES[expected](kernel, x, dy)
    assert expected in str(error.value)
