"""Model FLOPs: equal to hand counts, to XLA's count of one layer, and to three times the forward pass."""

import dataclasses
import math
from typing import Any

import architectures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from hope_jax import LanguageModel
from hope_jax import train as training
from hope_jax.levels import Level
from hope_jax.memory.kernels import AUTO
from hope_jax.models import ARCHITECTURES, Size, with_in_context
from hope_jax.nn.language_model import Block, Depth
from hope_jax.train.flops import PASSES, flops_per_token, forward_flops, model_flops, peak_flops
from hope_jax.train.step import abstract_params

SMALL = Size(width=32, layers=2, heads=2, vocab_size=48, context=64, levels=(Level(16), Level(32)))
ROWS = architectures.rows("transformer_conv", "gated_deltanet")
SQUARE, PRODUCT = jax.ShapeDtypeStruct((4, 4), jnp.float32), 2 * 4**3


def looped(a):
    """Three products in a scan, then one or two."""
    x = jax.lax.scan(lambda x, _: (x @ a, None), a, None, length=3)[0]
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ a, lambda x: x @ a @ a, x)


def waited(a):
    """Products until something happens."""
    return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ a, a)


def kernel(a):
    """A product in each of six cells of a grid."""

    def body(a_ref, b_ref):
        b_ref[...] = a_ref[...] @ a_ref[...]

    return pl.pallas_call(body, jax.ShapeDtypeStruct(a.shape, a.dtype), grid=(2, 3), interpret=True)(a)


def solved(a):
    """A triangular system of one column, whose inverse is known: what has a gradient of its own."""
    return AUTO.solve(a, a[0], a, a)


def parted(a):
    """Twelve rows of a product on two devices, and on four others the same."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    part = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows, check_vma=False)
    return part(jnp.tile(a, (3, 1)), a)


PROGRAMS = {looped: 5, waited: 1, kernel: 6, solved: 1, parted: 3, jax.checkpoint(looped): 5}


@pytest.mark.parametrize(
    "program, products", PROGRAMS.items(), ids=["scan", "while", "kernel", "solve", "parts", "remat"]
)
def test_every_kind_of_loop_counts_as_often_as_it_runs(program, products):
    assert forward_flops(program, SQUARE) == products * PRODUCT


def xla_flops(lowered: Any) -> float:
    """What XLA counts in a program that is not compiled."""
    return lowered.cost_analysis()["flops"]


def test_a_convolution_counts_what_xla_counts():
    def convolved(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", feature_group_count=2)

    shapes = jax.ShapeDtypeStruct((2, 4, 6, 6), jnp.float32), jax.ShapeDtypeStruct((8, 2, 3, 3), jnp.float32)
    assert forward_flops(convolved, *shapes) == xla_flops(jax.jit(convolved).lower(*shapes))


def small(name, **changes):
    """A model, its abstract parameters and its loss."""
    model = LanguageModel(dataclasses.replace(ARCHITECTURES[name](SMALL), **changes))
    return model, abstract_params(model), training.next_token_loss(model, np.ones(SMALL.vocab_size))


def windows(batch, length):
    """Shapes of a batch of text."""
    return jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)


def test_a_transformer_counts_six_per_weight_and_token_and_its_attention():
    """By hand: 6 N per token of N weights in matrices; scores and mixed values of the keys that blocks of 128 see."""
    model, params, loss = small("transformer_pp")
    matrices = sum(
        math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not path[-1].key.startswith("scale")
    )
    seen = 128 * 128 + 128 * 256
    attention = model.config.layers * 2 * (2 * seen * model.config.width)
    assert model_flops(loss, params, windows(1, 256)) == 256 * 6 * matrices + 3 * attention
    assert flops_per_token(model.config, 256) == 6 * matrices + 3 * attention / 256


def test_the_gradient_of_a_transformer_is_two_more_forward_passes():
    _, params, loss = small("transformer_pp")
    whole = forward_flops(jax.grad(loss, has_aux=True), params, windows(2, 32))
    assert whole == model_flops(loss, params, windows(2, 32)) == PASSES * forward_flops(loss, params, windows(2, 32))


def test_what_is_computed_again_to_save_memory_is_not_of_the_model():
    config, shapes = ARCHITECTURES["transformer_pp"](SMALL), windows(2, 256)
    run = training.TextRun(config, training.OptimizerConfig(), 2, 256, 0, "", "")
    setup = training.text_setup(run, 1, np.ones(48), remat_every=64)
    assert setup.flops(shapes) == 2 * 256 * flops_per_token(config, 256)
    assert model_flops(setup.loss, setup.shapes().params, shapes) > setup.flops(shapes)


def test_blocks_that_are_computed_again_count_once_where_the_loss_has_gradients_in_it():
    config, shapes = with_in_context(ARCHITECTURES["hope_attention"](SMALL), (8, 16)), windows(2, 32)
    run = training.TextRun(config, training.OptimizerConfig(), 2, 32, 0, "", "")
    none, block = (training.text_setup(run, 1, np.ones(48), remat=remat) for remat in ("none", "block"))
    assert none.flops(shapes) == block.flops(shapes)
    assert model_flops(block.loss, block.shapes().params, shapes) > block.flops(shapes)


def test_every_layer_counts_the_same():
    one, two, four = (flops_per_token(small("transformer_pp", layers=layers)[0].config, 32) for layers in (1, 2, 4))
    assert four - two == 2 * (two - one) > 0


# XLA counts elementwise work, too: a norm, a softmax and an activation are some ten operations for each entry, a
# product of width 512 is a thousand. The memories work on small matrices, so the share of the rest is larger there.
LAYERS = [("transformer_pp", 64, 0.03), ("deltanet", 32, 0.05)]
LAYERS += [pytest.param("hope", 16, 0.15, marks=pytest.mark.slow)]


@pytest.mark.parametrize("name, length, tolerance", LAYERS)
def test_a_layer_counts_what_xla_counts_but_for_elementwise_work(name, length, tolerance):
    """Of so many tokens that the memories have one chunk: XLA counts the body of a loop once."""
    config = ARCHITECTURES[name](dataclasses.replace(SMALL, width=512, heads=8))
    block, x = Block(config), Depth(jax.ShapeDtypeStruct((2, length, 512), jnp.float32), ())
    variables = jax.eval_shape(block.init, jax.random.key(0), x, None)

    def read(variables, x):
        return block.apply(variables, x, None)

    ours, theirs = forward_flops(read, variables, x), xla_flops(jax.jit(read).lower(variables, x))
    assert ours <= theirs <= (1 + tolerance) * ours


@pytest.mark.parametrize("name", ROWS)
def test_every_architecture_multiplies_each_token_by_its_matrices(name):
    """At least: memories and attention come on top. Scales and biases, a hundredth of the weights, multiply nothing."""
    model, params, _ = small(name)

    def read(params, tokens):
        return model.apply({"params": params}, tokens)

    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert forward_flops(read, params, jax.ShapeDtypeStruct((2, 32), jnp.int32)) > 0.95 * 2 * 2 * 32 * weights


def test_the_peak_is_that_of_the_first_name_that_fits_and_unknown_devices_have_none():
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5p") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12 and peak_flops("TPU v6 lite") == 918e12
    assert peak_flops("NVIDIA H100 NVL") == 835e12 and peak_flops("NVIDIA H200") == 989e12
    unknown = "cpu", "TPU v4 lite", "NVIDIA H200 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
    assert [peak_flops(kind) for kind in unknown] == [None] * len(unknown)
