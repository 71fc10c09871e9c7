"""Axis names: every parameter of every model has them, and what follows from them is listed here in full."""

import dataclasses
import functools

import architectures
import jax
import jax.numpy as jnp
import pytest
from jax.tree_util import keystr, tree_leaves_with_path
from listed_axes import LISTED, fits, listed

from hope_jax import MODELS, LanguageModel, stacking
from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.models import ARCHITECTURES, Size, with_in_context
from hope_jax.nn import axes as logical
from hope_jax.nn.feed_forward.fast import Writes
from hope_jax.optim import MatrixView, matrix_views

NANO = {name: build(Size(16, 2, 2, 32, 32, (Level(8), Level(32)))) for name, build in ARCHITECTURES.items()}
HOPE = NANO["hope"]


def hope(**fields):
    """Hope with other settings of its mixer."""
    return dataclasses.replace(HOPE, mixer=dataclasses.replace(HOPE.mixer, **fields))


CONFIGS = {
    **NANO,
    "hope, static projections": hope(inner_projection=(), momentum="none"),
    "hope, projected queries": hope(inner_projection=("k", "v", "q"), momentum="const"),
    "levels in context": with_in_context(HOPE, [8, 32], "independent", Writes(rank=3)),
    "head of its own": dataclasses.replace(NANO["transformer_pp"], tied=False),
    "stacked levels": stacking.stack_levels(
        NANO["transformer_pp"], {"norm": {"scale": jnp.ones(16)}, "blocks": {"feed_forward": {}}}, [4]
    )[0],
}
# Fast is what follows from names, and where Hope and attention have settings of their own. The mixer of "levels in
# context" is that of "hope".
rows = pytest.mark.parametrize("row", architectures.rows("titans", "gated_deltanet", of=CONFIGS))


@functools.cache
def shapes(row):
    """The parameters' shapes."""
    model = LanguageModel(CONFIGS[row])
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@rows
def test_every_parameter_has_one_name_per_axis_and_equal_names_are_equal_sizes(row):
    sizes, names = {}, logical.flat(LanguageModel(CONFIGS[row]).axes())
    params = {keystr(path): leaf.shape for path, leaf in tree_leaves_with_path(shapes(row))}
    assert names.keys() == params.keys()
    for path, shape in params.items():
        assert len(names[path]) == len(shape), path
        for name, size in zip(names[path], shape, strict=True):
            sizes.setdefault(name, {})[path] = size
    for name in ("layers", "heads", "embed", "hidden", "vocab", "taps", "head_dim", "rank"):
        assert len(set(sizes.get(name, {}).values())) <= 1, sizes[name]


@rows
def test_matrices_and_decay_are_those_of_the_list(row):
    axes = LanguageModel(CONFIGS[row]).axes()
    views = matrix_views(shapes(row), logical.matrices(axes))
    decayed = logical.decays(axes)(shapes(row))
    for (path, leaf), view, decays in zip(
        tree_leaves_with_path(shapes(row)), is_none(views), jax.tree.leaves(decayed), strict=True
    ):
        expected, follows = LISTED[listed(keystr(path, simple=True, separator="/"))]
        assert fits(logical.flat(axes)[keystr(path)], expected), path
        assert ("matrix" in follows, "decays" in follows) == (view is not None, decays), path
        if view is not None:  # the last two axes, for every copy
            assert view == MatrixView(leaf.shape, tuple(range(leaf.ndim - 2)), (leaf.ndim - 2,), (leaf.ndim - 1,))


def is_none(views):
    """Views in the order of the leaves; None is one."""
    return jax.tree.leaves(views, is_leaf=lambda view: view is None)


@pytest.mark.slow
def test_the_list_has_nothing_that_no_model_has():
    paths = (path for row in CONFIGS for path, _ in tree_leaves_with_path(shapes(row)))
    assert {listed(keystr(path, simple=True, separator="/")) for path in paths} == LISTED.keys()


def test_m3_sees_every_layer_and_head_of_hope_as_a_matrix_of_its_own():
    layers, heads, size = 2, HOPE.mixer.heads, 8
    row = "levels in context"
    views = matrix_views(shapes(row), logical.matrices(LanguageModel(CONFIGS[row]).axes()))["blocks"]["mixer"]
    seen = {name: view.matrix_shape for name, view in views.items() if isinstance(view, MatrixView)}
    assert seen == {
        **{f"start_memory_{i}": (layers, heads, size, size) for i in (0, 1)},
        **{f"start_projections_{i}": (layers, heads, 2, size, size) for i in (0, 1)},
        "start_gates_0": (layers, heads, 2, size, 8),
        "start_gates_1": (layers, heads, 2, 8, 1),
    }


# One of each family of mixers; that every parameter decays as it is listed is tested above.
FAMILIES = ("hope", "titans_mac", "gated_deltanet", "rwkv7", "ttt_mlp", "transformer_pp")


@pytest.mark.parametrize("name", architectures.rows(*FAMILIES))
def test_most_of_the_parameters_of_every_model_decay(name):
    model = LanguageModel(MODELS[f"{name}-tiny"])
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    decayed = jax.tree.leaves(logical.decays(model.axes())(params))
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    spared = sum(size for size, decays in zip(sizes, decayed, strict=True) if not decays)
    assert sum(sizes) - spared > 8 * spared


def test_a_part_of_the_tree_is_enough_and_stacking_puts_an_axis_in_front():
    axes = logical.stacked("layers", {"a": logical.dense_axes("embed", "hidden", bias=True), "b": ("heads",)})
    assert axes == {
        "a": {"kernel": ("layers", "embed", "hidden"), "bias": ("layers", "hidden")},
        "b": ("layers", "heads"),
    }
    assert logical.decays(axes)({"a": {"kernel": jnp.ones((2, 3, 4))}}) == {"a": {"kernel": True}}
    assert logical.decays(axes)({"a": {"bias": jnp.ones((2, 3))}, "b": None}) == {"a": {"bias": False}, "b": None}


@pytest.mark.parametrize(
    "axes, params, message",
    [
        ({"w": ("embed", "hiden")}, {"w": (2, 3)}, r"parameter \['w'\] has an axis 'hiden'; did you mean 'hidden'"),
        ({"w": ("embed", "hidden")}, {"v": (2, 3)}, r"parameter \['v'\] of shape \(2, 3\) has the axis names None"),
        ({"w": ("embed",)}, {"w": (2, 3)}, r"\['w'\] of shape \(2, 3\) has the axis names \('embed',\); expected one"),
    ],
    ids=["unknown name", "no names", "too few names"],
)
def test_names_that_do_not_fit_are_refused_by_the_parameters_name(axes, params, message):
    arrays = {name: jnp.ones(shape) for name, shape in params.items()}
    for rule in (logical.matrices, logical.decays):
        with pytest.raises(UserError, match=message):
            rule(axes)(arrays)
