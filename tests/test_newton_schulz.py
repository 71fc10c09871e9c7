"""Newton-Schulz against the singular value decomposition, and matrices seen in parameters of any shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references_momentum import newton_schulz

from hope_jax import optim
from hope_jax.errors import UserError
from hope_jax.models import MODELS
from hope_jax.nn.language_model import LanguageModel
from hope_jax.optim import MuonDimensionNumbers, matrix_labels, matrix_views, orthogonalize


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("method", ["quintic", "cubic"])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 6)])
def test_it_is_the_iteration_of_the_equations(method, shape, x64):
    x = draw(*shape)
    np.testing.assert_allclose(orthogonalize(jnp.array(x), 4, method), newton_schulz(x, 4, method), rtol=1e-9)


def test_cubic_tends_to_the_orthogonal_factor_of_the_decomposition(x64):
    x = draw(3, 6, 4)
    u, _, v = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(orthogonalize(jnp.array(x), 30, "cubic"), u @ v, atol=1e-9)
    sizes = jnp.linalg.svd(orthogonalize(jnp.array(x), method="cubic"), compute_uv=False)
    np.testing.assert_allclose(sizes, 1, atol=1e-3)


def test_quintic_is_near_after_five_steps():
    sizes = jnp.linalg.svd(orthogonalize(jnp.array(draw(20, 16, 24), jnp.float32)), compute_uv=False)
    assert jnp.all((sizes > 0.5) & (sizes < 1.3))


def test_the_first_cubic_step_is_a_gradient_step_on_orthogonality(x64):
    x = jnp.array(draw(5, 3)) / np.linalg.norm(draw(5, 3))
    loss = lambda o: 0.5 * jnp.sum((o.T @ o - jnp.eye(3)) ** 2)  # noqa: E731
    np.testing.assert_allclose(orthogonalize(x, 1, "cubic"), x - 0.25 * jax.grad(loss)(x), rtol=1e-6)


def test_stacks_transposes_zeros_and_sizes(x64):
    x = jnp.array(draw(2, 3, 4, 6)).at[0, 1].set(0)
    found = orthogonalize(x)
    np.testing.assert_allclose(found[1, 2], orthogonalize(x[1, 2]), rtol=1e-12)
    np.testing.assert_array_equal(found[0, 1], 0)
    np.testing.assert_allclose(orthogonalize(x.mT), found.mT, rtol=1e-12)
    np.testing.assert_allclose(orthogonalize(1e6 * x), found, rtol=1e-5, atol=1e-6)


def test_complex_matrices_have_a_unitary_factor(x64):
    x = jnp.array(draw(6, 4) + 1j * draw(6, 4, seed=1))
    u, _, v = jnp.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(orthogonalize(x, 30, "cubic"), u @ v, atol=1e-9)


def test_the_iteration_can_be_in_half_precision():
    x = jnp.array(draw(8, 12), jnp.float32)
    half, full = orthogonalize(x, dtype=jnp.bfloat16), orthogonalize(x)
    assert half.dtype == jnp.float32 and not jnp.array_equal(half, full)
    np.testing.assert_array_equal(half, half.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(half, full, atol=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=jnp.ones(3)), r"x has shape \(3,\)"),
        (dict(steps=0), "steps is 0"),
        (dict(steps=2.5), "steps is 2.5"),
        (dict(method="sextic"), "method is 'sextic'"),
        (dict(dtype=jnp.int8), "dtype is"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments, message, untyped):
    with pytest.raises(UserError, match=message):
        orthogonalize(**{"x": jnp.ones((2, 2)), **arguments})


SHAPES = {
    (4, 6): ("matrix", (4, 6)),
    (2, 3, 4): ("matrix", (2, 12)),
    (2, 5, 7): (MuonDimensionNumbers(1, 2), (2, 5, 7)),
    (7, 3, 5): (MuonDimensionNumbers((0, 1), 2), (21, 5)),
    (5, 2, 3, 4): (MuonDimensionNumbers(-1, (0, 2)), (2, 4, 15)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_parameter_seen_as_matrices_and_back_is_the_parameter(shape):
    label, expected = SHAPES[shape]
    x = jnp.array(draw(*shape))
    view = matrix_views({"w": x}, lambda params: {"w": label})["w"]
    assert view.to_matrices(x).shape == view.matrix_shape == expected
    np.testing.assert_array_equal(view.from_matrices(view.to_matrices(x)), x)


def test_the_axes_of_a_view_are_the_declared_ones():
    x = jnp.array(draw(5, 2, 3, 4))
    view = matrix_views({"w": x}, lambda params: {"w": MuonDimensionNumbers(-1, (0, 2))})["w"]
    assert view.to_matrices(x)[1, 3, 2 * 3 + 1] == x[2, 1, 1, 3]


def test_the_parameters_of_a_model_are_matrices_below_their_layers_and_heads():
    model = LanguageModel(MODELS["hope-tiny"])
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    axes = {"blocks": 1, "initial_memory_*": 1, "initial_projections_*": 2, "initial_gates_*": 2}
    views = matrix_views(params, matrix_labels(axes, exclude=("embedding", "conv_*", "momentum_*", "scale_*")))
    assert views["embedding"] is None and views["norm"]["scale"] is None and views["blocks"]["norm"]["scale"] is None
    mixer = views["blocks"]["mixer"]
    assert mixer["conv_k"]["kernel"] is None and mixer["rate_bias"] is None
    assert mixer["out"]["down"]["kernel"].matrix_shape == (2, 384, 192)
    assert mixer["initial_memory_0"].matrix_shape == (2, 6, 32, 32)
    assert mixer["initial_projections_0"].matrix_shape == (2, 6, 2, 32, 32)


def test_stacked_layers_are_stepped_as_each_alone():
    layers = {"blocks": {"kernel": jnp.array(draw(3, 4, 6), jnp.float32)}}
    tx = optim.m3(0.1, matrices=matrix_labels({"blocks": 1}))
    grads = jax.tree.map(jnp.sin, layers)
    together, _ = tx.update(grads, tx.init(layers), layers)
    for i in range(3):
        one, slope = {"kernel": layers["blocks"]["kernel"][i]}, {"kernel": grads["blocks"]["kernel"][i]}
        alone, _ = optim.m3(0.1).update(slope, optim.m3(0.1).init(one), one)
        np.testing.assert_allclose(together["blocks"]["kernel"][i], alone["kernel"], rtol=1e-4, atol=1e-6)


def test_names_decide_which_leaves_are_no_matrices():
    names = ("kernel", "Embed_0", "token_embedding", "head", "lm_head", "multi_headed", "scale")
    labels = matrix_labels()({name: {"w": jnp.ones((2, 3))} for name in names})
    assert [name for name in names if labels[name]["w"] == "matrix"] == ["kernel", "multi_headed", "scale"]
    assert matrix_labels()({"w": jnp.ones(3), "s": jnp.ones(()), "none": None}) == {
        "w": "adamw",
        "s": "adamw",
        "none": None,
    }


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (lambda params: {"a": {"w": "muon"}}, r"parameter \['a'\]\['w'\] is labelled 'muon'"),
        (lambda params: {"a": {"w": MuonDimensionNumbers(0, 0)}}, r"\['a'\]\['w'\], shape \(2, 3, 4\)"),
        (lambda params: {"a": {"w": MuonDimensionNumbers(0, 3)}}, r"\['a'\]\['w'\], shape \(2, 3, 4\)"),
        (lambda params: {"b": "matrix"}, "labels are not shaped like the parameters"),
        (matrix_labels({"a": 4}), r"\['a'\]\['w'\] has shape \(2, 3, 4\); batch_axes takes 4"),
    ],
)
def test_labels_that_do_not_fit_are_refused_by_name(labels, message):
    for tx in (optim.m3(0.1, matrices=labels), optim.delta_momentum(0.1, matrices=labels)):
        with pytest.raises(UserError, match=message):
            tx.init({"a": {"w": jnp.ones((2, 3, 4))}})


def test_negative_batch_axes_are_refused():
    with pytest.raises(UserError, match="batch_axes is"):
        matrix_labels({"blocks": -1})
