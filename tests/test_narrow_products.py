"""Products of bfloat16 numbers: what numpy makes of the same parts, and where the forms of a memory take them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_recurrence import ALL, draw, outputs

from hope_jax.memory.kernels import NARROW, products_of
from hope_jax.memory.kernels.bfloat16 import rounded


def first(x):
    """8 bits of each number, of two that are as near the larger one."""
    part, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.trunc(256 * part + np.copysign(0.5, part)) / 256, exponent)


def emulated(a, b, passes):
    """a b in float64, of operands that are cut into bfloat16 numbers."""
    product = first(a) @ first(b)
    if passes == 3:
        product += first(a) @ first(b - first(b)) + first(a - first(a)) @ first(b)
    return product


def test_numbers_are_rounded_to_the_nearest():
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32) * np.float32(10.0) ** np.arange(-30, 30, 0.06)
    x = np.concatenate([x.astype(np.float32), [0.0, -0.0, np.inf, -np.inf]]).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(rounded)(x), first(x))
    nan = np.array([0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(rounded(jnp.asarray(nan))).all()


@pytest.mark.parametrize(("form", "passes", "error"), [("bfloat16", 1, 3e-3), ("bfloat16_3x", 3, 2e-5)])
def test_products_and_their_gradients_are_those_of_the_parts(form, passes, error):
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 2, 12, 12)).astype(np.float32)
    forms = NARROW[form]

    def values(a, b, c):
        products = forms.matmul(a, b), forms.matmul_nt(a, b), forms.matmul_tn(a, b), forms.gram(a)
        return sum(jnp.sum(product * c) for product in products), products

    (_, found), slopes = jax.jit(jax.value_and_grad(values, argnums=(0, 1), has_aux=True))(a, b, c)
    at, bt, ct = (np.swapaxes(x, 1, 2) for x in (a, b, c))
    for one, pair in zip(found, ((a, b), (a, bt), (at, b), (a, at)), strict=True):
        np.testing.assert_allclose(one, emulated(*pair, passes), rtol=1e-6, atol=1e-5)
        exact = np.matmul(*(x.astype(np.float64) for x in pair))
        assert error / 30 < np.linalg.norm(one - exact) / np.linalg.norm(exact) < error
    of_a = sum(emulated(*pair, passes) for pair in ((c, bt), (c, b), (b, ct), (c + ct, a)))
    of_b = sum(emulated(*pair, passes) for pair in ((at, c), (ct, a), (a, c)))
    for one, expected in zip(slopes, (of_a, of_b), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-6, atol=3e-5)


def test_a_memory_takes_them():
    """Reads of 46 tokens: near the definition, and the nearer the more passes."""
    inputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), draw(ALL, 46))
    forms = "chunked", "chunked_bfloat16_3x", "chunked_bfloat16", "sequential"
    *found, expected = (
        jax.jit(lambda x, impl=impl: outputs(x, impl=impl, read="after", block=8)[0])(inputs) for impl in forms
    )
    near, nearer, far = (float(jnp.linalg.norm(x - expected) / jnp.linalg.norm(expected)) for x in found)
    assert near < 1e-5 and near < nearer < 1e-3 and 10 * nearer < far < 0.1
    assert [products_of(f"pallas{end}") is products_of(f"chunked{end}") for end in ("", "_bfloat16")] == [True, True]
