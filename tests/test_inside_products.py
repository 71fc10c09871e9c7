"""Products inside a kernel: what numpy computes, their gradients, and systems that are inverted side by side."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.memory import gated_delta, kernels
from hope_jax.memory.kernels import INSIDE, PLAIN
from hope_jax.memory.kernels.inside import _few_rows, _parts

FORMS = {"matmul": ("ij", "jk"), "matmul_nt": ("ij", "kj"), "matmul_tn": ("ji", "jk")}


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(function, *given):
    """What comes out, and the gradients of the sum of its sines, and of the sum of squares of those."""

    def once(*given):
        return jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x))), range(len(given)))(*given)

    twice = jax.grad(lambda *x: sum(jnp.sum(y**2) for y in once(*x)), range(len(given)))(*given)
    return function(*given), once(*given), twice


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(3, 5, 4), (3, 1, 4), (3, 5, 1), (1, 5, 4)])
def test_products_and_their_gradients(x64, form, sizes):
    """Also of single columns and rows, which the matrix unit does not see."""
    size, rng = dict(zip("ijk", sizes, strict=True)), np.random.default_rng(0)
    a, b = (rng.normal(size=(2, *(size[axis] for axis in axes))) for axes in FORMS[form])

    def expected(a, b):
        return jnp.einsum("n{},n{}->nik".format(*FORMS[form]), a, b)

    for found, right in zip(*(with_gradients(f, a, b) for f in (getattr(INSIDE, form), expected)), strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12), found, right)


def test_joined_products_are_those_one_by_one(x64):
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(2, 4, k)), rng.normal(size=(2, k, 3))) for k in (5, 1, 2)]
    keys, right = rng.normal(size=(4, 6)), [rng.normal(size=(4, n)) for n in (1, 3, 2)]
    for products in INSIDE, PLAIN:
        found, each = jax.jit(lambda *x, p=products: (p.matmul_sum(*x[0]), p.matmul_tn_each(*x[1:])))(
            pairs, keys, *right
        )
        np.testing.assert_allclose(found, sum(a @ b for a, b in pairs), rtol=1e-12)
        for one, b in zip(each, right, strict=True):
            np.testing.assert_allclose(one, keys.T @ b, rtol=1e-12)


@pytest.mark.parametrize(
    ("systems", "count"), [(8, 16), (3, 8), (5, 64), (1, 256), (2, 4), (2, 24)], ids=lambda n: str(n)
)
def test_systems_are_inverted_side_by_side(systems, count):
    """Of 4 and of 24 tokens as elsewhere."""
    lower = np.tril(np.random.default_rng(0).normal(size=(systems, count, count)), -1) * count**-0.5
    expected = np.linalg.inv(np.eye(count) + lower)
    found = jax.jit(INSIDE.inverse)(jnp.asarray(lower, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.jit(INSIDE.inverse)(lower), expected, rtol=1e-9, atol=1e-9)


def test_a_solution_has_the_gradients_of_lapack(x64):
    rng = np.random.default_rng(0)
    lower, weights, right = np.tril(rng.normal(size=(8, 8)), -1), rng.normal(size=8), rng.normal(size=(8, 3))

    def found(lower, weights, right):
        lower = jnp.tril(lower, -1)
        return INSIDE.solve(lower, weights, right, INSIDE.inverse((lower * weights[None])[None])[0])

    def expected(lower, weights, right):
        return jnp.linalg.solve(jnp.eye(8) + jnp.tril(lower, -1) * weights[None], right)

    for one, other in zip(*(with_gradients(f, lower, weights, right) for f in (found, expected)), strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-8), one, other)


def test_a_product_of_parts_is_as_exact_as_float32():
    """Numbers of very different sizes. Of a part of 8 bits at most 2^-7 is left, of two 2^-15: what is left out."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(32, 32)) * 10.0 ** rng.integers(-6, 6, (32, 32)) for _ in range(2))
    a, b = a.astype(np.float32), b.astype(np.float32)
    parts = [np.asarray(part) for part in jax.jit(_parts)(a)]
    for part in parts[:2]:  # what a matrix unit takes as it is
        np.testing.assert_array_equal(part, part.astype(jnp.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(parts[2] + parts[1] + parts[0], a)
    found, sizes = jax.jit(_few_rows)(a, b), np.abs(a).astype(np.float64) @ np.abs(b)
    assert np.max(np.abs(found - a.astype(np.float64) @ b) / sizes) < 2.0**-21


@pytest.mark.parametrize("retention", [(16,), (16, 4)], ids=["a number", "by key channel"])
def test_a_kernel_of_any_memory_has_them_and_nothing_else_does(monkeypatch, retention):
    inverted = []

    def inverse(lower):
        inverted.append(lower.shape)
        return INSIDE.inverse(lower)

    monkeypatch.setattr(kernels, "INSIDE", INSIDE._replace(inverse=inverse))
    keys, memory, gates = (
        jnp.ones((16, 4)) / 2,
        jnp.zeros((4, 4)),
        dict(retention=jnp.ones(retention), erase=jnp.ones(16)),
    )
    for impl, used in (("chunked", False), ("pallas", True)):
        gated_delta(memory, keys, keys, keys, **gates, block=8, impl=impl)
        assert bool(inverted) == used
