"""The dense layer that carries delta gradient descent in its gradient."""

import doctest
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax import optim
from hope_jax.optim import dgd_update
from hope_jax.optim.dgd import DeltaDot, rows_of


def losses(layer, x, target):
    """The mean loss of a layer over its rows, of its parameters and its input."""
    return lambda params, x=x: jnp.mean(jnp.sum((jnp.sin(layer.apply(params, x)) - target) ** 2, axis=-1))


def layers(dtype=jnp.float64, **fields):
    """A delta layer, the same as a Dense, their parameters, inputs [2, 5, 4] and targets [2, 5, 3]."""
    draw = np.random.default_rng(0)
    x, target = (jnp.asarray(draw.normal(size=(2, 5, n)), dtype) for n in (4, 3))
    delta, dense = optim.delta_dense(3, **fields, param_dtype=dtype), nn.Dense(3, param_dtype=dtype)
    shapes = jax.eval_shape(dense.init, jax.random.key(0), x)
    return delta, dense, jax.tree.map(lambda p: jnp.asarray(draw.normal(size=p.shape), p.dtype), shapes), x, target


def test_the_gradient_is_that_of_the_loss_with_the_delta_term_added(x64):
    delta, dense, params, x, target = layers(strength=0.6)

    def longer(params, x):
        read = jax.lax.stop_gradient(x) @ params["params"]["kernel"]
        return losses(dense, x, target)(params, x) + 0.6 / (2 * 10) * jnp.sum(read**2)

    @jax.jit
    def all_three(params, x):
        both = (jax.value_and_grad(losses(layer, x, target), argnums=(0, 1))(params, x) for layer in (delta, dense))
        return *both, jax.grad(longer)(params, x)

    found, plain, expected = all_three(params, x)
    assert found[0] == pytest.approx(float(plain[0]), rel=1e-14)
    np.testing.assert_allclose(found[1][1], plain[1][1], rtol=1e-13, atol=1e-15)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), found[1][0], expected)


def test_the_gradient_of_a_complex_kernel_is_that_of_the_loss_with_the_term_added(x64):
    draw = np.random.default_rng(4)
    x, kernel, target = (jnp.asarray(draw.normal(size=s) + 1j * draw.normal(size=s)) for s in ((6, 4), (4, 3), (6, 3)))
    dims = (((1,), (0,)), ((), ()))

    def size(y):
        return jnp.sum(jnp.abs(y) ** 2)

    def mean(kernel):
        return size(DeltaDot(0.5)(x, kernel, dims) - target) / 6

    def plain(kernel):
        return size(x @ kernel - target) / 6 + 0.5 / (2 * 6) * size(x @ kernel)

    found, expected = jax.jit(lambda kernel: (jax.grad(mean)(kernel), jax.grad(plain)(kernel)))(kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("strength", [np.float32(0.5), jnp.float32(0.5), np.int64(1)])
def test_strength_may_be_any_real_scalar(strength, untyped):
    layer = optim.delta_dense(3, strength=strength)
    assert hash(layer) == hash(optim.delta_dense(3, strength=float(strength)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_strength_0_is_dense_to_the_bit(dtype):
    delta, dense, params, x, target = layers(jnp.float32, strength=0.0)
    delta, dense = (module.clone(dtype=dtype) for module in (delta, dense))
    assert jax.tree.structure(jax.eval_shape(delta.init, jax.random.key(0), x)) == jax.tree.structure(params)
    found, expected = (
        jax.jit(jax.value_and_grad(losses(layer, x, target), argnums=(0, 1)))(params, x) for layer in (delta, dense)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_sgd_on_the_layer_is_the_cheap_step(x64):
    """lr/N is the coefficient rate / (1 + rate ||X||^2) at rate = c / (1 - c ||X||^2)."""
    delta, _, params, x, target = layers(strength=1.0, use_bias=False)
    kernel, rows = jnp.asarray(params["params"]["kernel"]), x.reshape(10, 4)
    lr = 0.05

    def of_sum(y):
        return jnp.sum((jnp.sin(y) - target) ** 2)

    @jax.jit
    def moved_and_cheap(params):
        grads = jax.grad(losses(delta, x, target))(params)
        moved: Any = optax.apply_updates(params, optax.sgd(lr).update(grads, optax.sgd(lr).init(params))[0])
        dy = jax.grad(of_sum)(x @ kernel)
        rate = (lr / 10) / (1 - (lr / 10) * jnp.sum(rows**2))
        return moved["params"]["kernel"], dgd_update(kernel, x, dy, rate, form="cheap")

    np.testing.assert_allclose(*moved_and_cheap(params), rtol=1e-11, atol=1e-13)


def test_rows_tells_the_layer_what_it_cannot_see_under_vmap(x64):
    """One row at a time the layer sees N = 1 while the loss averages five."""
    delta, _, params, x, target = layers(strength=0.6)
    five = optim.delta_dense(3, strength=0.6, rows=5, param_dtype=jnp.float64)

    def mean(layer):
        return lambda params: jnp.mean(jax.vmap(lambda x, t: losses(layer, x, t)(params))(x[0], target[0]))

    functions = losses(delta, x[0], target[0]), mean(five), mean(delta)
    expected, found, unaware = jax.jit(lambda params: [jax.grad(f)(params) for f in functions])(params)
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
    params = jax.jit(scanned.init)(jax.random.key(0), x)["params"]
    apart = {f"layer_{i}": jax.tree.map(lambda p, i=i: p[i], params["layers"]) for i in range(3)}

    def loss(model):
        return lambda params: jnp.mean(model.apply({"params": params}, x) ** 2)

    found, expected = jax.jit(lambda *both: (jax.grad(loss(scanned))(both[0]), jax.grad(loss(loop))(both[1])))(
        params, apart
    )
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
    params = jax.jit(plain.init)(jax.random.key(0), x)

    def longer(p):
        return jnp.mean(jnp.sin(plain.apply(p, x))) + 0.6 / (2 * 5) * jnp.sum(
            (jax.lax.stop_gradient(x).reshape(5, 6) @ p["params"]["kernel"].reshape(6, 4)) ** 2
        )

    def written(p):
        return jnp.mean(jnp.sin(delta.apply(p, x)))

    found, expected = jax.jit(lambda p: (jax.grad(written)(p), jax.grad(longer)(p)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected)


def test_two_layers_of_the_same_settings_are_equal_so_that_nothing_compiles_twice():
    assert optim.delta_dense(3, strength=0.5) == optim.delta_dense(3, strength=0.5)
    assert hash(optim.delta_dense(3)) == hash(optim.delta_dense(3)) != hash(optim.delta_dense(3, rows=2))


def test_the_example_of_the_docstring_runs():
    examples = doctest.DocTestFinder().find(optim.delta_dense, globs={})
    results = doctest.DocTestRunner().run(examples[0])
    assert (results.failed, results.attempted) == (0, 9)


def test_rows_are_counted_over_all_axes_that_are_not_contracted():
    assert rows_of((2, 3, 4), (2,)) == rows_of((2, 3, 4), (-1,)) == 6
    assert rows_of((4,), (0,)) == 1 and rows_of((0, 4), (1,)) == 1
