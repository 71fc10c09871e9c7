"""Newton-Schulz against the singular value decomposition, and matrices seen in parameters of any shape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references_momentum import newton_schulz

from hope_jax import optim
from hope_jax.errors import UserError
from hope_jax.optim import MuonDimensionNumbers, matrix_labels, matrix_views, orthogonalize


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@functools.partial(jax.jit, static_argnames=("steps", "method", "dtype"))
def found(x, steps=None, method="quintic", dtype=None):
    """``orthogonalize`` as one compiled program."""
    return orthogonalize(x, steps, method, dtype)


def sizes_of(x):
    """The singular values of matrices."""
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


@pytest.mark.parametrize(
    ("shape", "method"), [((3, 5), "quintic"), ((5, 3), "quintic"), ((1, 6), "quintic"), ((5, 3), "cubic")], ids=str
)
def test_it_is_the_iteration_of_the_equations(method, shape, x64):
    x = draw(*shape)
    np.testing.assert_allclose(found(x, 4, method), newton_schulz(x, 4, method), rtol=1e-9)


def test_cubic_tends_to_the_orthogonal_factor_of_the_decomposition(x64):
    x = draw(3, 6, 4)
    u, _, v = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(found(x, 30, "cubic"), u @ v, atol=1e-9)
    np.testing.assert_allclose(sizes_of(found(x, method="cubic")), 1, atol=1e-3)


def test_quintic_is_near_after_five_steps():
    sizes = sizes_of(found(draw(20, 16, 24).astype(np.float32)))
    assert np.all((sizes > 0.5) & (sizes < 1.3))


def test_the_first_cubic_step_is_a_gradient_step_on_orthogonality(x64):
    x = draw(5, 3) / np.linalg.norm(draw(5, 3))

    def loss(o):
        return 0.5 * jnp.sum((o.T @ o - jnp.eye(3)) ** 2)

    np.testing.assert_allclose(found(x, 1, "cubic"), x - 0.25 * jax.jit(jax.grad(loss))(x), rtol=1e-6)


def test_stacks_transposes_zeros_and_sizes(x64):
    x = draw(2, 3, 4, 6)
    x[0, 1] = 0
    every = np.asarray(found(x))
    np.testing.assert_allclose(every[1, 2], found(x[1, 2]), rtol=1e-12)
    np.testing.assert_array_equal(every[0, 1], 0)
    np.testing.assert_allclose(found(np.swapaxes(x, -1, -2)), np.swapaxes(every, -1, -2), rtol=1e-12)
    np.testing.assert_allclose(found(1e6 * x), every, rtol=1e-5, atol=1e-6)


def test_complex_matrices_have_a_unitary_factor(x64):
    x = draw(6, 4) + 1j * draw(6, 4, seed=1)
    u, _, v = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(found(x, 30, "cubic"), u @ v, atol=1e-9)


def test_the_iteration_can_be_in_half_precision():
    x = draw(8, 12).astype(np.float32)
    half, full = found(x, dtype=jnp.bfloat16), found(x)
    assert half.dtype == jnp.float32 and not np.array_equal(half, full)
    program = str(jax.make_jaxpr(lambda x: orthogonalize(x, dtype=jnp.bfloat16))(x))
    assert "bf16[8,8]" in program and "f32[8,8]" not in program, "a Gram matrix in full precision"
    np.testing.assert_allclose(half, full, atol=0.1)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e3, 1e20, 1e36])
def test_the_largest_and_the_smallest_numbers_neither_overflow_nor_vanish(size):
    x = draw(64, 48)
    expected = newton_schulz(size * x)
    np.testing.assert_allclose(found(np.float32(size * x)), expected, atol=2e-3 * np.abs(expected).max())


def test_half_precision_matrices_do_not_overflow():
    x = np.float16(100 * draw(128, 128))
    assert np.sum(np.square(x, dtype=np.float64)) > np.finfo(np.float16).max
    sizes = sizes_of(found(x))
    assert np.mean((sizes > 0.4) & (sizes < 1.4)) > 0.95


def test_its_derivative_is_that_of_the_iteration(x64):
    x, direction = draw(3, 5), draw(3, 5, seed=1)
    slope = jax.jit(lambda *of: jax.jvp(orthogonalize, of[:1], of[1:])[1])(x, direction)
    h = 1e-6
    expected = (newton_schulz(x + h * direction) - newton_schulz(x - h * direction)) / (2 * h)
    np.testing.assert_allclose(slope, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=jnp.ones(3)), r"x has shape \(3,\)"),
        (dict(steps=0), "steps is 0"),
        (dict(steps=2.5), "steps is 2.5"),
        (dict(method="sextic"), "method is 'sextic'"),
        (dict(dtype=jnp.int8), "dtype is"),
        (dict(dtype="bf16"), "dtype is 'bf16'; expected a floating type"),
        (dict(x=jnp.ones((2, 3), int)), "x has dtype int32"),
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
    """Named as those of a Hope of two layers; what the models themselves say is in ``test_axes.py``."""
    of_mixer = {
        "conv_k": {"kernel": (2, 4, 192)},
        "rate_bias": (2, 6),
        "out": {"down": {"kernel": (2, 384, 192)}},
        "start_memory_0": (2, 6, 32, 32),
        "start_projections_0": (2, 6, 2, 32, 32),
    }
    shapes = {"embedding": (256, 192), "norm": {"scale": (192,)}}
    shapes["blocks"] = {"norm": {"scale": (2, 192)}, "mixer": of_mixer}
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, "float32"), shapes, is_leaf=lambda s: type(s) is tuple)
    axes = {"blocks": 1, "start_memory_*": 1, "start_projections_*": 2, "start_gates_*": 2}
    views = matrix_views(params, matrix_labels(axes, exclude=("embedding", "conv_*", "momentum_*", "scale_*")))
    assert views["embedding"] is None and views["norm"]["scale"] is None and views["blocks"]["norm"]["scale"] is None
    mixer = views["blocks"]["mixer"]
    assert mixer["conv_k"]["kernel"] is None and mixer["rate_bias"] is None
    assert mixer["out"]["down"]["kernel"].matrix_shape == (2, 384, 192)
    assert mixer["start_memory_0"].matrix_shape == (2, 6, 32, 32)
    assert mixer["start_projections_0"].matrix_shape == (2, 6, 2, 32, 32)


def test_axes_decide_and_more_than_two_need_declaring():
    shapes = {"kernel": (2, 3), "conv": (3, 3, 4, 5), "blocks_0": (7, 2, 3)}
    found = matrix_labels({"Blocks*": 1})({name: jnp.ones(shape) for name, shape in shapes.items()})
    assert found == {"kernel": "matrix", "conv": "adamw", "blocks_0": MuonDimensionNumbers(1, 2)}
    with pytest.raises(UserError, match=r"\['conv'\] of shape \(3, 3, 4, 5\), which is no matrix; declare its axes"):
        optim.scale_by_m3().init({"conv": jnp.ones((3, 3, 4, 5))})


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
        (
            lambda params: {"a": {"w": MuonDimensionNumbers(0, 0)}},
            r"\['a'\]\['w'\] of shape \(2, 3, 4\) is labelled Muon",
        ),
        (
            lambda params: {"a": {"w": MuonDimensionNumbers(0, 3)}},
            r"\['a'\]\['w'\] of shape \(2, 3, 4\) is labelled Muon",
        ),
        (lambda params: {"b": "matrix"}, "labels are not shaped like the parameters"),
        (matrix_labels({"a": 4}), r"\['a'\]\['w'\] has shape \(2, 3, 4\); batch_axes takes 4"),
    ],
)
def test_labels_that_do_not_fit_are_refused_by_name(labels, message):
    for tx in (optim.m3(0.1, matrices=labels), optim.delta_momentum(0.1, matrices=labels)):
        with pytest.raises(UserError, match=message):
            tx.init({"a": {"w": jnp.ones((2, 3, 4))}})


def test_capitals_in_patterns_are_no_matter():
    params = {"MyHead": {"w": jnp.ones((2, 3))}, "body": {"w": jnp.ones((2, 3))}}
    assert matrix_labels(exclude=("MyHead",))(params) == {"MyHead": {"w": "adamw"}, "body": {"w": "matrix"}}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: matrix_labels({"blocks": -1}), r"batch_axes\['blocks'\] is -1"),
        (lambda: matrix_labels({"blocks": 1.5}), r"batch_axes\['blocks'\] is 1.5"),
        (
            lambda: matrix_labels(exclude="embed"),
            "exclude is 'embed'; expected several patterns",
        ),
        (lambda: optim.m3(0.1, matrices={"w": "matrix"}), "matrices is {'w': 'matrix'}; expected a function"),
    ],
)
def test_wrong_rules_are_refused(make, message, untyped):
    with pytest.raises(UserError, match=message):
        make()


def test_cubic_takes_fifteen_steps_and_complex_matrices_keep_their_type(x64):
    x = draw(3, 5)
    np.testing.assert_array_equal(found(x, method="cubic"), found(x, 15, "cubic"))
    np.testing.assert_array_equal(found(x), found(x, 5))
    z = draw(3, 5) + 1j * draw(3, 5, seed=1)
    np.testing.assert_array_equal(found(z, dtype=jnp.bfloat16), found(z))
