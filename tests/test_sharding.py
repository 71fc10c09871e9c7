"""Training on meshes of eight devices: the numbers of one device, parameters and optimizer states in parts."""

import functools
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from test_cli import mistake

from hope_jax import models
from hope_jax import train as training
from hope_jax.cli.dry_run import bytes_each
from hope_jax.cli.in_context import InContextConfig
from hope_jax.cli.pretrain import PretrainConfig
from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.models import ARCHITECTURES, LanguageModel, Size
from hope_jax.nn.axes import AXES, matrices
from hope_jax.optim import M3, AdamW, Muon, scale_by_m3
from hope_jax.optim.m3_rules import MomentumScale
from hope_jax.optim.newton_schulz import NewtonSchulz
from hope_jax.train.mesh import MESH, MeshConfig
from hope_jax.train.sharding import (
    LEFT_OVER,
    RULES,
    _spread,
    partition,
    placed,
    specs_of_parameters,
)

VOCAB, B, T = 48, 8, 64  # several chunks of every memory
SIZE = Size(width=32, layers=2, heads=4, vocab_size=VOCAB, context=64, levels=(Level(16), Level(32)))
MESHES = {"all": MeshConfig(2, 2, 2), "fsdp": MeshConfig(1, 8)}


@pytest.mark.parametrize(("method", "copies"), [(AdamW(), 2), (Muon(), 1), (M3(), 4)], ids=["adamw", "muon", "m3"])
def test_what_the_optimizer_keeps_of_a_parameter_lies_where_the_parameter_does(method, copies):
    mesh, model = MESHES["all"].make(B), LanguageModel(ARCHITECTURES["transformer_pp"](SIZE))
    config = training.OptimizerConfig(method, 1e-3)
    tx = training.optimizer(config, 10, model.config.update_every(B * T), model.axes())
    params = training.abstract_params(model)
    trees = params, jax.eval_shape(tx.init, params)
    where = placed(mesh, specs_of_parameters(mesh.shape, model.axes(), params), trees)
    of_params, of_state = (
        Counter(place.spec for leaf, place in zip(*map(jax.tree.leaves, pair), strict=True) if leaf.ndim == 3)
        for pair in zip(trees, where, strict=True)
    )
    assert of_params == {PartitionSpec(None, "fsdp", "tensor"): 5, PartitionSpec(None, "tensor", "fsdp"): 2}
    assert of_state == {spec: copies * count for spec, count in of_params.items()}


COLLECTIVE = re.compile(r"(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(-start)?\(")


def orthogonal_step(mesh, steps, by_matrix=True):
    """Eight maps [16, 24] after a step of M3, and the number of collectives in the program."""

    def loss(params, batch):
        value = jnp.mean(jnp.einsum("bi,lio->blo", batch, params["kernel"]) ** 3)
        return value, {"loss": training.Mean(value, jnp.float32(1))}

    axes, draw = {"kernel": ("layers", "embed", "hidden")}, np.random.default_rng(0)
    scales, labels = (MomentumScale(1, 0.9), MomentumScale(2, 0.9)), matrices(axes)
    tx = optax.chain(scale_by_m3(scales, newton_schulz=NewtonSchulz(steps), matrices=labels), optax.scale(-0.1))
    how = {"mesh": mesh and mesh.make(8), "axes": axes, "by_matrix": by_matrix}
    setup = training.Setup(lambda key: {"kernel": jnp.zeros((8, 16, 24))}, loss, tx, lambda step: 0.1, **how)
    state = setup.start(0, {"kernel": draw.normal(size=(8, 16, 24))})
    batch = setup.place(draw.normal(size=(8, 16)))
    program = cast(Any, setup.step).lower(state, batch).compile()
    for _ in range(3):
        state, _ = program(state, batch)
    return jax.device_get(state), len(COLLECTIVE.findall(program.as_text()))


def test_matrices_are_orthogonalised_each_in_one_place(x64):
    expected, _ = orthogonal_step(None, 2)
    found, few = orthogonal_step(MESHES["all"], 2)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), found, expected)
    assert few == orthogonal_step(MESHES["all"], 1)[1]  # none inside the iteration
    assert few < orthogonal_step(MESHES["all"], 2, by_matrix=False)[1]


def line(mesh):
    """A setup of one map [16, 8] and its bias."""

    def init(key):
        return {"kernel": jax.random.normal(key, (16, 8)), "bias": jnp.zeros(8)}

    def loss(params, batch):
        value = jnp.mean((batch @ params["kernel"] + params["bias"][None]) ** 2)
        return value, {"loss": training.Mean(value, jnp.float32(1))}

    axes = {"kernel": ("embed", "hidden"), "bias": ("hidden",)}
    return training.Setup(init, loss, optax.adam(0.1), lambda step: 0.1, mesh=mesh and mesh.make(8), axes=axes)


def test_parameters_are_drawn_in_parts_saved_and_restored_on_another_mesh(tmp_path):
    one, first, second = line(None), line(MeshConfig(2, 2, 2)), line(MeshConfig(1, 4, 2))
    start = first.start(3)
    assert start.params["kernel"].addressable_shards[0].data.shape == (8, 4)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(start), jax.device_get(one.start(3)))
    assert [bytes_each(setup.shapes().params) for setup in (one, first, second)] == [4 * 136, 4 * 36, 4 * 20]
    batch = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    state, _ = first.step(start, first.place(batch))
    training.save(tmp_path, state, {}, {}, keep=2)
    for setup in (first, second, one):
        found = training.restore(tmp_path, 1, setup.shapes())
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(state))
        assert jax.tree.map(lambda leaf: leaf.sharding, found) == setup.placement
    moved, _ = second.step(training.restore(tmp_path, 1, second.shapes()), second.place(batch))
    assert moved.params["kernel"].sharding.spec == PartitionSpec("fsdp", "tensor")
    assert cast(Any, second.step)._cache_size() == 1
    stayed, _ = first.step(state, first.place(batch))
    np.testing.assert_allclose(*(jax.device_get(x.params["kernel"]) for x in (moved, stayed)), rtol=1e-5)


def test_every_axis_name_has_a_rule_and_a_mesh_axis_splits_one_axis_of_a_parameter():
    assert RULES.keys() == AXES.keys() > LEFT_OVER.keys()
    both, fsdp = {"data": 2, "fsdp": 4, "tensor": 2}, {"data": 1, "fsdp": 8, "tensor": 1}
    assert partition(both, ("layers", "embed", "all_heads"), (2, 16, 16)) == PartitionSpec(None, "fsdp", "tensor")
    assert partition(both, ("all_heads", "all_heads"), (16, 16)) == PartitionSpec("tensor", "fsdp")
    assert partition(both, ("all_heads", "all_heads"), (16, 18)) == PartitionSpec("tensor", None)
    assert partition(fsdp, ("hidden", "embed"), (16, 16)) == PartitionSpec(None, "fsdp")
    assert partition(fsdp, ("heads", "head_dim", "memory_hidden"), (8, 12, 16)) == PartitionSpec(None, None, "fsdp")
    with pytest.raises(UserError, match="no rule for the axis 'hiden'; did you mean 'hidden'"):
        partition(both, ("hiden",), (8,))


def test_with_fsdp_alone_each_device_holds_its_part_of_all_parameters():
    mesh, model = MESHES["fsdp"].make(B), LanguageModel(ARCHITECTURES["hope"](replace(SIZE, width=64)))
    params = training.abstract_params(model)
    where = placed(mesh, specs_of_parameters(mesh.shape, model.axes(), params), params)
    leaves = list(zip(jax.tree.leaves(params), jax.tree.leaves(where), strict=True))
    held = sum(math.prod(place.shard_shape(leaf.shape)) for leaf, place in leaves)
    assert held <= 1.15 * sum(leaf.size for leaf, _ in leaves) / mesh.size


@pytest.mark.parametrize(
    ("shape", "sizes", "expected"),
    [
        ((2, 4, 3), (12,), [("fsdp", "tensor")]),
        ((2, 4, 1), (2, 12), ["data", "fsdp"]),
        ((1, 16, 1), (24,), [None]),
    ],
)
def test_matrices_are_spread_over_as_many_devices_as_divide_their_number(shape, sizes, expected):
    assert _spread(dict(zip(MESH, shape, strict=False)), sizes) == PartitionSpec(*expected)


def test_as_many_devices_share_a_batch_as_are_left_and_divide_it(monkeypatch):
    monkeypatch.setattr("hope_jax.train.mesh.cores", lambda: 4)
    assert [MeshConfig().make(batch).size for batch in (1, 2, 3, 4, 6, 7, 8)] == [1, 2, 3, 4, 3, 1, 4]
    assert MeshConfig(8).make(8).size == 8  # simulated ones, asked for
    assert dict(MeshConfig(fsdp=2).make(8).shape) == {"data": 2, "fsdp": 2, "tensor": 1, "sequence": 1}
    assert [MeshConfig(*given).of_host for given in ((), (3,), (None, 2), (None, 8), (2, 2, 2))] == [None, 3, 4, 8, 8]
    odd = line(MeshConfig(2)).place(np.zeros((3, 5)))
    assert odd.sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(data=0), "mesh.data is 0; give a whole number of at least 1"),
        (
            dict(data=16),
            "mesh.data 16, .*mesh.sequence 1: 16 devices are asked for, which do not divide the 8",
        ),
        (dict(fsdp=3), "mesh.fsdp is 3, which cannot share 16 sequences"),
        (dict(data=3), "mesh.data x mesh.fsdp is 3, which cannot share 16 sequences"),
        (dict(fsdp=16), "mesh.fsdp is 16; give a divisor of the model's width, 24"),
        (dict(tensor=8), "mesh.tensor is 8; give a divisor of the model's heads, 4"),
        (dict(tensor=2, sequence=4), "mesh.tensor x mesh.sequence is 8; give a divisor of the model's heads, 4"),
    ],
)
def test_what_does_not_divide_is_named(given, said):
    with pytest.raises(UserError, match=said):
        mesh = MeshConfig(**given)
        mesh.check_batch(16)
        mesh.check_model(ARCHITECTURES["transformer_pp"](replace(SIZE, width=24)))
        mesh.make(16)


def test_every_named_model_is_asked_whether_its_heads_can_be_shared():
    for model in models.MODELS.values():
        MeshConfig().check_model(model)
    with pytest.raises(UserError, match="mesh.tensor is 7; give a divisor of the model's heads, "):
        MeshConfig(tensor=7).check_model(models.MODELS["mamba2-tiny"])
    with pytest.raises(UserError, match="mesh.sequence is 2 and a mixer TitansMACConfig"):
        MeshConfig(sequence=2).check_model(models.MODELS["titans_mac-tiny"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (dict(batch=8, accumulate=2, mesh=MeshConfig(8)), "mesh.data x mesh.fsdp is 8, which cannot share 4 sequences"),
        (dict(length=31, mesh=MeshConfig(sequence=2)), "mesh.sequence is 2, which cannot share the 31 tokens"),
        (dict(cms=InContextConfig((4, 8)), mesh=MeshConfig(sequence=3)), "cannot share the 4 tokens"),
        (dict(mesh=MeshConfig(tensor=7)), "mesh.tensor is 7; give a divisor of the model's heads"),
    ],
)
def test_a_mesh_that_does_not_fit_the_flags_is_refused_before_anything_is_read(flags, said):
    with pytest.raises(UserError, match=said):
        PretrainConfig(Path("run"), **flags)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--mesh.data 3", "mesh.data x mesh.fsdp is 3, which cannot share 4 sequences; give a divisor of that"),
        ("--mesh.fsdp 3", "mesh.fsdp is 3, which cannot share 4 sequences; give a divisor of that"),
        ("--batch 5 --mesh.fsdp 5", "mesh.fsdp is 5; give a divisor of the model's width, 192"),
        ("--mesh.tensor 4", "mesh.tensor is 4; give a divisor of the model's heads, 6"),
        ("--model hope_attention-tiny --mesh.tensor 3", "mesh.tensor is 3; give a divisor of 296 on axis 'hidden'"),
        ("--model rwkv7-tiny --mesh.tensor 2", "mesh.tensor is 2; give a divisor of 3 on axis 'heads'"),
        ("--model mamba2-tiny --mesh.tensor 3", "mesh.tensor is 3; give a divisor of 512 on axis 'all_heads'"),
        ("--mesh.sequence 3", "mesh.sequence is 3, which cannot share the 512 tokens of a sequence"),
        ("--mesh.tensor 2 --mesh.sequence 2", "mesh.tensor x mesh.sequence is 4; give a divisor of the model's heads"),
        ("--model rwkv7-tiny --mesh.sequence 2", "mesh.sequence is 2 and a mixer RWKV7Config; leave it out"),
    ],
)
def test_the_command_refuses_what_devices_cannot_share_before_it_makes_a_folder(capfd, tmp_path, flags, said):
    assert said in mistake(capfd, ["pretrain", "--run", str(tmp_path / "run"), *flags.split()])
    assert not (tmp_path / "run").exists()


def test_the_command_refuses_more_devices_than_there_are(capfd, tmp_path):
    (tmp_path / "text.txt").write_text("some text. " * 2000)
    flags = ["--batch", "16", "--length", "32", "--mesh.data", "16", "--data.path", str(tmp_path / "text.txt")]
    error = mistake(capfd, ["pretrain", "--run", str(tmp_path / "run"), *flags])
    assert "16 devices are asked for, which do not divide the 8 that there are" in error


def test_a_parameter_that_cannot_be_split_is_named():
    setup = replace(line(MeshConfig(1, 1, 8)), init=lambda key: {"kernel": jnp.zeros((16, 12)), "bias": jnp.zeros(12)})
    with pytest.raises(
        UserError, match=r"mesh.tensor is 8; give a divisor of 12 on axis 'hidden' .* parameter \['bias'\]"
    ):
        setup.shapes()
