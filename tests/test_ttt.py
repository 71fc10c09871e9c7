"""TTT layers and the convolution in front of them: against numpy, in any cut, and what they must not do."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_ttt
from drawn import drawn
from references import derivative

from hope_jax.errors import UserError
from hope_jax.nn.axes import decays, flat
from hope_jax.nn.mixers.convolution import ConvolutionConfig
from hope_jax.nn.mixers.ttt import TTTConfig

WIDTH, HEADS, T, PERIOD = 12, 2, 20, 4
SIZE = WIDTH // HEADS
LINEAR = TTTConfig(HEADS, "linear", rate_max=0.9, mini_batch=PERIOD)
MLP = TTTConfig(HEADS, "mlp", rate_max=0.7, mini_batch=PERIOD, hidden=2, impl="chunked")


def run(module, u):
    return module(u, module.init_state(len(u), 0))[0]


def layer(config):
    """A layer, its parameters away from their starts (zeros and ones would hide mistakes), two sequences.

    One of the factors is below 0, where it is cut off.
    """
    module, u = config.build(WIDTH, jnp.float64), np.random.default_rng(1).normal(size=(2, T, WIDTH))
    params: Any = drawn(functools.partial(module.init, method=run), u[:, :1], inner_scale=1.0)
    if "gain" in params and len(params["gain"]) == PERIOD:
        params["gain"] = jnp.asarray([0.1, -0.05, -1.0, 0.2])
    return module, params, u


def fresh(module, params):
    """The state before the first token, whose position is known."""
    return module.apply({"params": params}, 2, 0, method="init_state")


def reader(module):
    """Compiled (parameters, input) -> (output, state) of fresh sequences."""
    return jax.jit(lambda params, u: module.apply({"params": params}, u, fresh(module, params)))


def published(axes, params):
    """The parameters with the features of each head in the order in which adjacent ones make a rotary pair."""
    pairs = np.arange(SIZE).reshape(2, -1).T.ravel()
    order = {"head_dim": pairs, "all_heads": np.concatenate([h * SIZE + pairs for h in range(HEADS)])}
    if isinstance(axes, dict):
        return {name: published(axes[name], params[name]) for name in params}
    for axis, name in enumerate(axes):
        params = np.take(np.asarray(params), order.get(name, np.arange(params.shape[axis])), axis)
    return params


def nested(leaves):
    """A tree of dicts from paths like ``conv_q/bias``."""
    tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def paths(tree, prefix=""):
    """The reverse of ``nested``."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: np.asarray(tree)}
    return {path: leaf for name, node in tree.items() for path, leaf in paths(node, f"{prefix}{name}/").items()}


def test_the_inner_gradient_of_the_reference_is_that_of_its_loss():
    rng = np.random.default_rng(0)
    shapes = {"w0": (4, 8), "b0": (8,), "w1": (8, 4), "b1": (4,)}
    point = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    toward = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    norm, k, v = rng.normal(size=(2, 4)), rng.normal(size=4), rng.normal(size=4)

    def loss(w0, b0, w1, b1):
        return references_ttt.inner_loss([(w0, b0), (w1, b1)], norm, k, v)

    weights = [(point["w0"], point["b0"]), (point["w1"], point["b1"])]
    (dw0, db0), (dw1, db1) = references_ttt.inner_gradient(weights, norm, k, v)
    slope = sum(np.sum(g * toward[n]) for n, g in {"w0": dw0, "b0": db0, "w1": dw1, "b1": db1}.items())
    np.testing.assert_allclose(slope, derivative(loss, point, toward), rtol=1e-12)


@functools.cache
def pulled():
    """The layer of MLPs, and compiled (parameters, input, weight [T,D]) -> (weighted sum of the second sequence's
    outputs, (outputs, first and last state)), gradients."""
    module, params, u = layer(MLP)

    def value(params, u, weight):
        start = fresh(module, params)
        y, end = module.apply({"params": params}, u, start)
        return jnp.sum(y[1] * weight), (y, start, end)

    return module, params, u, jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))


def test_the_layer_is_its_equations_and_a_token_knows_its_own_past_only(x64):
    """Values, and the derivative along a direction of all parameters, of the second sequence's first 14 tokens."""
    module, params, u, pull = pulled()
    weight = np.random.default_rng(3).normal(size=u[1].shape)
    weight[14:] = 0
    (_, (y, *_)), (gradient, of_inputs) = pull(params, u, weight)
    leaves = paths(published(module.axes(), params))

    def reference(**leaves):
        return references_ttt.layer(nested(leaves), u[1], HEADS, PERIOD, MLP.rate_max)

    np.testing.assert_allclose(y[1], reference(**leaves), rtol=1e-9, atol=1e-10)
    rng = np.random.default_rng(1)
    toward = {name: rng.normal(size=leaf.shape) for name, leaf in leaves.items()}
    found = paths(published(module.axes(), gradient))
    expected = np.sum(derivative(reference, leaves, toward) * weight)
    np.testing.assert_allclose(sum(np.sum(found[n] * toward[n]) for n in found), expected, rtol=1e-9)
    of_inputs = np.asarray(of_inputs)
    assert not np.any(of_inputs[0]) and not np.any(of_inputs[1, 14:])
    assert np.all(np.any(of_inputs[1, :14] != 0, axis=-1))


@pytest.mark.parametrize("name", ["mlp", "convolution"])
def test_any_cut_is_the_whole_and_padding_leaves_no_trace(x64, name):
    if name == "mlp":
        module, params, u, pull = pulled()
        (_, (whole, state, end)), _ = pull(params, u, np.zeros_like(u[0]))
    else:
        module, params, u = layer(ConvolutionConfig())
        state, (whole, end) = fresh(module, params), reader(module)(params, u)
    call = jax.jit(lambda u, state, count=None: module.apply({"params": params}, u, state, count))
    read, pieces = 0, []
    for count in (6, 1, 5, 4, 3):
        padded = np.full((2, 6, WIDTH), 1e3)
        padded[:, :count] = u[:, read : read + count]
        y, state = call(padded, state, np.int32(count))
        pieces.append(y[:, :count])
        read += count
    y, state = call(u[:, read:], state)
    np.testing.assert_allclose(np.concatenate([*pieces, y], axis=1), whole, rtol=1e-9, atol=1e-11)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), state, end)


SEQUENTIAL = TTTConfig(HEADS, "mlp", 0.7, 2, mini_batch=1, impl="sequential")
STILL = TTTConfig(HEADS, "linear", 0.0, mini_batch=PERIOD, impl="chunked")


@pytest.mark.parametrize("config", [LINEAR, SEQUENTIAL, STILL])
def test_other_forms_and_the_limits_are_the_same_equations(x64, config):
    """A mini-batch of 1 is plain gradient descent, token by token; a rate of 0 leaves the inner weights as they are."""
    module, params, u = layer(config)
    u = u[:, :18]  # no whole mini-batches of 4
    y, end = reader(module)(params, u)
    known = published(module.axes(), params)
    expected = references_ttt.layer(known, u[1], HEADS, config.mini_batch, config.rate_max)
    np.testing.assert_allclose(y[1], expected, rtol=1e-9, atol=1e-10)
    start = fresh(module, params)
    moved = [np.any(np.asarray(a) != b) for a, b in zip(start.inner.anchor, end.inner.anchor, strict=True)]
    assert moved == [config.rate_max > 0] * len(moved)


def test_the_convolution_is_its_equation(x64):
    module, params, u = layer(ConvolutionConfig())
    y, _ = reader(module)(params, u)
    expected = references_ttt.convolved(u[1], jax.tree.map(np.asarray, params["conv"]))
    np.testing.assert_allclose(y[1], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("config", [LINEAR, MLP, ConvolutionConfig()])
def test_every_parameter_has_names_and_only_the_projections_decay(config):
    module = config.build(WIDTH, jnp.float32)
    u = jnp.zeros((1, 1, WIDTH))
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), u, method=run)["params"])
    decayed = {path for path, on in paths_of(decays(module.axes())(params)).items() if on}
    projections = {f"['{name}']['kernel']" for name in ("project_qk", "project_v", "gate", "out")}
    assert decayed == (set() if isinstance(config, ConvolutionConfig) else projections)
    assert flat(module.axes()).keys() == paths_of(params).keys()


def paths_of(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_layers_start_as_published():
    module = TTTConfig(4, "mlp", 0.1).build(256, jnp.float32)
    u = jnp.zeros((1, 1, 256))
    params = jax.jit(lambda key: module.init(key, u, method=run)["params"])(jax.random.key(0))
    drawn = {path: leaf for path, leaf in paths_of(params).items() if path.endswith("['kernel']") or "weights" in path}
    for path, leaf in drawn.items():
        assert np.std(leaf) == pytest.approx(0.5 if "conv" in path else 0.02, rel=0.05), path
    for path, leaf in paths_of(params).items():
        assert path in drawn or np.all(leaf == (1 if "scale" in path else 0)), path
    assert (
        sum(leaf.size for leaf in paths_of(params).values())
        == (4 + 8 / 4) * 256**2 + (10 + 2 + 2 + 5 + 4) * 256 + 4 + 16
    )


@pytest.mark.parametrize("bad, words", [
    (dict(memory="matrix"), "memory"), (dict(mini_batch=0), "mini_batch"), (dict(rate_max=-1.0), "rate_max"),
    (dict(rope_base=1.0), "rope_base"), (dict(heads=0), "heads"), (dict(conv=0), "conv"), (dict(impl="fast"), "impl"),
])  # fmt: skip
def test_bad_settings_are_refused_by_name(untyped, bad, words):
    with pytest.raises(UserError, match=words):
        TTTConfig(**(dict(heads=2) | bad))


def test_a_width_that_heads_cannot_share_is_refused():
    with pytest.raises(UserError, match="multiple of 4"):
        TTTConfig(2).build(10, jnp.float32)
    with pytest.raises(UserError, match="conv"):
        ConvolutionConfig(0)
