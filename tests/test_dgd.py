"""Delta gradient descent against its definition, and the dense layer that carries it in its gradient."""

import doctest
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax import optim
from hope_jax.errors import UserError
from hope_jax.optim import dgd_update, ggd_step
from hope_jax.optim.delta_dense import DeltaDot

FORMS = ["exact", "cheap"]
ROWS_IN_OUT = [(1, 4, 3), (3, 8, 2), (8, 3, 5), (4, 4, 4)]


def problem(rows, inputs, outputs, scale=1.7):
    """Kernel [in, out], X [rows, in], dY [rows, out] with keys far from unit length."""
    draw = np.random.default_rng(rows * 100 + inputs)
    shapes = (inputs, outputs), (rows, inputs), (rows, outputs)
    return tuple(jnp.asarray(scale * draw.normal(size=shape)) for shape in shapes)


def minimiser(kernel, x, dy, rate):
    """argmin_K 1/2 ||X K - U||^2 + 1/(2 rate) ||K - K_t||^2, U = -dY, by least squares on the stacked equations."""
    identity = np.eye(kernel.shape[0]) / np.sqrt(rate)
    stacked = np.concatenate([x, identity]), np.concatenate([-dy, identity @ kernel])
    return np.linalg.lstsq(*stacked, rcond=None)[0]


def printed(weights, x, gradient, rate):
    """Eq. 56-57 for one column x, W [out, in], with the eta' that is right for any length of x."""
    r = rate / (1 + rate * x @ x)
    return weights @ (np.eye(len(x)) - r * np.outer(x, x)) - r * np.outer(gradient, x)


@pytest.mark.parametrize("rate", [0.05, 3.0])
@pytest.mark.parametrize("shape", ROWS_IN_OUT, ids=str)
def test_the_exact_form_is_the_minimiser_on_both_sides_of_woodbury(shape, rate, x64):
    kernel, x, dy = problem(*shape)
    expected = minimiser(kernel, x, dy, rate)
    np.testing.assert_allclose(dgd_update(kernel, x, dy, rate), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_one_row_is_the_printed_equation_in_the_flax_orientation(form, x64):
    kernel, x, dy = problem(1, 4, 3)
    expected = printed(kernel.T, x[0], dy[0], 0.7).T
    np.testing.assert_allclose(dgd_update(kernel, x, dy, 0.7, form=form), expected, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(dgd_update(kernel, x[0], dy[0], 0.7, form=form), expected, rtol=1e-11, atol=1e-11)


def test_the_cheap_form_is_one_gradient_step_and_never_raises_the_objective(x64):
    kernel, x, dy = problem(8, 3, 5)
    for rate in (1e-2, 1.0, 1e4):
        step = rate / (1 + rate * np.sum(x * x))

        def objective(k, rate=rate):
            return jnp.sum((x @ k + dy) ** 2) / 2 + jnp.sum((k - kernel) ** 2) / (2 * rate)

        moved = dgd_update(kernel, x, dy, rate, form="cheap")
        np.testing.assert_allclose(moved, kernel - step * jax.grad(objective)(kernel), rtol=1e-10, atol=1e-10)
        assert objective(moved) < objective(kernel)


@pytest.mark.parametrize("form", FORMS)
def test_without_surprise_the_kernel_shrinks_along_its_inputs_and_nowhere_else(form, x64):
    kernel, x, dy = problem(3, 8, 2)
    moved = np.asarray(dgd_update(kernel, x, 0 * dy, 1e6, form=form))
    seen = np.linalg.pinv(x) @ x
    np.testing.assert_allclose(moved - seen @ moved, kernel - seen @ kernel, atol=1e-9)
    assert np.linalg.norm(x @ moved) < (1e-4 if form == "exact" else 1.0) * np.linalg.norm(x @ kernel)


@pytest.mark.parametrize("form", FORMS)
def test_leading_axes_are_rows_and_bfloat16_stays_bfloat16(form):
    kernel, x, dy = (jnp.asarray(a, jnp.bfloat16) for a in problem(8, 3, 5))
    moved = jax.jit(dgd_update, static_argnames="form")(
        kernel, x.reshape(2, 4, 3), dy.reshape(2, 4, 5), jnp.float32(0.3), form=form
    )
    expected = dgd_update(*(a.astype(jnp.float32) for a in (kernel, x, dy)), 0.3, form=form)
    assert moved.dtype == jnp.bfloat16
    np.testing.assert_allclose(moved.astype(jnp.float32), expected, rtol=1e-2, atol=1e-2)


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
    "kernel has shape (3,)": lambda k, x, dy: dgd_update(k[0], x, dy, 0.1),
    "inputs have shape (8, 2)": lambda k, x, dy: dgd_update(k, x[:, :2], dy, 0.1),
    "output_gradients have shape (8, 4); expected (8, 3)": lambda k, x, dy: dgd_update(k, x, jnp.ones((8, 4)), 0.1),
    "steps is 0": lambda k, x, dy: ggd_step(k, x, None, None, None, rate=0.1, steps=0),
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


# ---------------------------------------------------------------- the layer


def losses(layer, x, target):
    """The mean loss of a layer over its rows, of its parameters and its input."""
    return lambda params, x=x: jnp.mean(jnp.sum((jnp.sin(layer.apply(params, x)) - target) ** 2, axis=-1))


def layers(dtype=jnp.float64, **fields):
    """A delta layer, the same as a Dense, their parameters, inputs [2, 5, 4] and targets [2, 5, 3]."""
    draw = np.random.default_rng(0)
    x, target = (jnp.asarray(draw.normal(size=(2, 5, n)), dtype) for n in (4, 3))
    delta, dense = optim.delta_dense(3, **fields, param_dtype=dtype), nn.Dense(3, param_dtype=dtype)
    params = dense.init(jax.random.key(0), x)
    return delta, dense, params, x, target


def test_the_gradient_is_that_of_the_loss_with_the_delta_term_added(x64):
    delta, dense, params, x, target = layers(strength=0.6)

    def longer(params, x):
        read = jax.lax.stop_gradient(x) @ params["params"]["kernel"]
        return losses(dense, x, target)(params, x) + 0.6 / (2 * 10) * jnp.sum(read**2)

    found = jax.jit(jax.value_and_grad(losses(delta, x, target), argnums=(0, 1)))(params, x)
    plain = jax.value_and_grad(losses(dense, x, target), argnums=(0, 1))(params, x)
    expected = jax.grad(longer)(params, x)
    assert found[0] == pytest.approx(float(plain[0]), rel=1e-14)
    np.testing.assert_allclose(found[1][1], plain[1][1], rtol=1e-13, atol=1e-15)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), found[1][0], expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_strength_0_is_dense_to_the_bit(dtype):
    delta, dense, params, x, target = layers(jnp.float32, strength=0.0)
    delta, dense = (module.clone(dtype=dtype) for module in (delta, dense))
    assert jax.tree.structure(delta.init(jax.random.key(0), x)) == jax.tree.structure(params)
    found, expected = (
        jax.jit(jax.value_and_grad(losses(layer, x, target), argnums=(0, 1)))(params, x) for layer in (delta, dense)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_sgd_on_the_layer_is_the_cheap_step(x64):
    """lr/N is the coefficient rate / (1 + rate ||X||^2) at rate = c / (1 - c ||X||^2)."""
    delta, _, params, x, target = layers(strength=1.0, use_bias=False)
    kernel, rows = jnp.asarray(params["params"]["kernel"]), x.reshape(10, 4)
    lr = 0.05
    grads = jax.grad(losses(delta, x, target))(params)
    moved: Any = optax.apply_updates(params, optax.sgd(lr).update(grads, optax.sgd(lr).init(params))[0])

    def of_sum(y):
        return jnp.sum((jnp.sin(y) - target) ** 2)

    dy = jax.grad(of_sum)(x @ kernel)
    rate = (lr / 10) / (1 - (lr / 10) * float(jnp.sum(rows**2)))
    expected = dgd_update(kernel, x, dy, rate, form="cheap")
    np.testing.assert_allclose(moved["params"]["kernel"], expected, rtol=1e-11, atol=1e-13)


def test_rows_tells_the_layer_what_it_cannot_see_under_vmap(x64):
    """One row at a time the layer sees N = 1 while the loss averages five."""
    delta, _, params, x, target = layers(strength=0.6)
    five = optim.delta_dense(3, strength=0.6, rows=5, param_dtype=jnp.float64)

    def mean(layer):
        return lambda params: jnp.mean(jax.vmap(lambda x, t: losses(layer, x, t)(params))(x[0], target[0]))

    expected = jax.grad(losses(delta, x[0], target[0]))(params)
    found, unaware = jax.grad(mean(five))(params), jax.grad(mean(delta))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), found, expected)
    assert jnp.abs(unaware["params"]["kernel"] - expected["params"]["kernel"]).max() > 0.1


class Stack(nn.Module):
    """The layer three times, as a model would have it: scanned over depth and rematerialised."""

    scanned: bool

    @nn.compact
    def __call__(self, x):
        def body(layer, x, _):
            return jnp.tanh(layer(x)), None

        def make(**name):
            return optim.delta_dense(4, strength=0.5, param_dtype=jnp.float64, **name)

        if not self.scanned:
            for i in range(3):
                x, _ = body(make(name=f"layer_{i}"), x, None)
            return x
        over = nn.scan(nn.remat(body), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return over(make(name="layers"), x, None)[0]


def test_scan_and_remat_leave_the_delta_term_alone(x64):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)))
    scanned, loop = Stack(True), Stack(False)
    params = scanned.init(jax.random.key(0), x)["params"]
    apart = {f"layer_{i}": jax.tree.map(lambda p, i=i: p[i], params["layers"]) for i in range(3)}

    def loss(model):
        return lambda params: jnp.mean(model.apply({"params": params}, x) ** 2)

    found, expected = jax.jit(jax.grad(loss(scanned)))(params), jax.grad(loss(loop))(apart)
    for i in range(3):
        one = jax.tree.map(lambda p, i=i: p[i], found["layers"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), one, expected[f"layer_{i}"])


def test_other_linen_layers_take_the_same_product(x64):
    """DenseGeneral contracts several axes; the rows are those that are left."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 2, 3)))
    delta, plain = (
        nn.DenseGeneral(4, axis=(-2, -1), use_bias=False, param_dtype=jnp.float64, dot_general=dot)
        for dot in (DeltaDot(0.6), jax.lax.dot_general)
    )
    params = plain.init(jax.random.key(0), x)

    def longer(p):
        return jnp.mean(jnp.sin(plain.apply(p, x))) + 0.6 / (2 * 5) * jnp.sum(
            (jax.lax.stop_gradient(x).reshape(5, 6) @ p["params"]["kernel"].reshape(6, 4)) ** 2
        )

    found, expected = jax.grad(lambda p: jnp.mean(jnp.sin(delta.apply(p, x))))(params), jax.grad(longer)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected)


def test_two_layers_of_the_same_settings_are_equal_so_that_nothing_compiles_twice():
    assert optim.delta_dense(3, strength=0.5) == optim.delta_dense(3, strength=0.5)
    assert hash(optim.delta_dense(3)) == hash(optim.delta_dense(3)) != hash(optim.delta_dense(3, rows=2))


def test_the_example_of_the_docstring_runs():
    examples = doctest.DocTestFinder().find(optim.delta_dense, globs={})
    results = doctest.DocTestRunner().run(examples[0])
    assert (results.failed, results.attempted) == (0, 9)
