"""Momentum, AdaGrad and Adam as memories of gradients: the minimisers found numerically, and optax's own numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.errors import UserError
from hope_jax.optim import associative


@pytest.fixture
def gradients(x64):
    """Nine gradients [9, 3, 2], float64."""
    return jnp.asarray(np.random.default_rng(0).normal(size=(9, 3, 2)))


def minimiser(gradients, value, ridge, decay):
    """argmin_m sum_i decay^(T-i) (m g_i - value)^2 + ridge m^2 by numpy's least squares, weight by weight."""
    weight = np.sqrt(decay ** np.arange(len(gradients) - 1, -1, -1.0))
    found = np.empty(value.shape)
    for index in np.ndindex(value.shape):
        keys = np.append(weight * gradients[(slice(None), *index)], np.sqrt(ridge))
        targets = np.append(weight * value[index], 0.0)
        found[index] = np.linalg.lstsq(keys[:, None], targets, rcond=None)[0][0]
    return found


@pytest.mark.parametrize("ridge, decay", [(0.0, 1.0), (0.3, 1.0), (0.0, 0.8), (2.0, 0.6)])
def test_the_closed_form_is_the_minimiser(gradients, ridge, decay):
    value = np.random.default_rng(1).normal(size=(3, 2))
    expected = minimiser(np.asarray(gradients), value, ridge, decay)
    found = associative.least_squares_memory(gradients, jnp.asarray(value), ridge, decay)
    np.testing.assert_allclose(found, expected, rtol=1e-11)


def last_update(tx, gradients):
    """What ``tx`` makes of the last of the gradients."""
    state = tx.init(jnp.zeros(gradients.shape[1:], gradients.dtype))
    for g in gradients:
        update, state = tx.update(g, state)
    return update


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_the_memory_of_the_second_moment_is_momentum(gradients, decay):
    expected = last_update(optax.trace(decay), gradients)
    np.testing.assert_allclose(associative.momentum_memory(gradients, decay), expected, rtol=1e-12)


def test_the_memory_of_its_root_is_adagrad_on_summed_momentum(gradients):
    """scale_by_rss divides the last gradient by the root of the sum of squares; here the sum of all goes there."""
    preconditioner = last_update(optax.scale_by_rss(0.0, eps=0.0), gradients) / gradients[-1]
    np.testing.assert_allclose(associative.adagrad_memory(gradients), gradients.sum(0) * preconditioner, rtol=1e-12)


@pytest.mark.parametrize("decay", [0.9, 0.99])
def test_the_memory_of_the_root_mean_square_is_adam_with_one_decay(gradients, decay):
    expected = last_update(optax.scale_by_adam(decay, decay, eps=0.0), gradients)
    np.testing.assert_allclose(associative.adam_memory(gradients, decay), expected, rtol=1e-11)


@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_the_matrix_memory_is_the_minimiser(gradients, ridge):
    keys = np.concatenate([np.asarray(g).T for g in gradients] + [np.sqrt(ridge) * np.eye(3)])
    values = np.concatenate([np.eye(2)] * len(gradients) + [np.zeros((3, 2))])
    expected = np.linalg.lstsq(keys, values, rcond=None)[0]
    np.testing.assert_allclose(associative.matrix_memory(gradients, ridge), expected, rtol=1e-10)


def test_the_root_of_the_gram_turns_it_into_full_matrix_adagrad(gradients):
    gram = sum(np.asarray(g) @ np.asarray(g).T for g in gradients)
    found = associative.matrix_adagrad(gradients)
    root = np.linalg.svd(gram)
    half = root.U @ np.diag(np.sqrt(root.S)) @ root.Vh
    np.testing.assert_allclose(half @ found, gradients.sum(0), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(found, half @ associative.matrix_memory(gradients), rtol=1e-9, atol=1e-11)


def test_one_column_of_matrices_whose_gram_is_diagonal_is_adagrad(x64):
    """Gradients along single axes do not mix: full-matrix and elementwise AdaGrad agree there."""
    axes = np.random.default_rng(3).normal(size=9)
    gradients = jnp.asarray(np.eye(3)[np.arange(9) % 3] * axes[:, None])
    found = associative.matrix_adagrad(gradients[..., None])[:, 0]
    np.testing.assert_allclose(found, associative.adagrad_memory(gradients), rtol=1e-11)


MISTAKES = {
    "ridge is -1": lambda g: associative.least_squares_memory(g, g[0], ridge=-1.0),
    "decay is 0": lambda g: associative.momentum_memory(g, decay=0.0),
    "decay is 1.5": lambda g: associative.adam_memory(g, decay=1.5),
    "gradients have shape (0, 3, 2)": lambda g: associative.adagrad_memory(g[:0]),
    "gradients have shape (3, 2); expected [T, rows, cols]": lambda g: associative.matrix_memory(g[0]),
    "gradients have dtype complex64": lambda g: associative.momentum_memory(g.astype(jnp.complex64)),
    "gradients have dtype int32": lambda g: associative.matrix_memory(g.astype(jnp.int32)),
    "ridge is -2": lambda g: associative.matrix_memory(g, ridge=-2.0),
}


@pytest.mark.parametrize("expected", MISTAKES)
def test_a_mistake_is_one_sentence(expected, untyped):
    with pytest.raises(UserError) as error:
        MISTAKES[expected](jax.numpy.ones((4, 3, 2)))
    assert expected in str(error.value)
