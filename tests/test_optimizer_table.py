"""The table of training optimizers: settings that are data, and what each row builds."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.tree_util import tree_map_with_path

from hope_jax import optim
from hope_jax.cli.parse import parse
from hope_jax.cli.pretrain import PretrainConfig
from hope_jax.config import from_json, to_json
from hope_jax.errors import UserError
from hope_jax.optim import OPTIMIZERS, SGD, AdamW, Lion, Muon
from hope_jax.train import OptimizerConfig

names = pytest.mark.parametrize("name", OPTIMIZERS)


def parameters():
    """A matrix, a table that is none, and a vector."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"kernel": (4, 6), "table": (5, 3), "scale": (3,)}
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def labels(params):
    """What of the parameters is a matrix."""
    return tree_map_with_path(lambda path, _: "matrix" if path[0].key == "kernel" else "adamw", params)


def decays(params):
    """What of the parameters decays."""
    return tree_map_with_path(lambda path, _: path[0].key != "scale", params)


def moved(tx, *gradients):
    """The last update of the gradients in turn, at unchanged parameters."""
    params = updates = parameters()
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
    return updates


@names
def test_a_row_is_data_that_json_can_hold(name):
    row = OPTIMIZERS[name]
    config = OptimizerConfig(dataclasses.replace(row, weight_decay=0.25), learning_rate=1e-3)
    assert from_json(json.loads(json.dumps(to_json(config))), OptimizerConfig) == config
    assert hash(row) == hash(dataclasses.replace(row)) and config.method != row


@names
def test_a_row_follows_schedule_labels_and_decay_mask(name):
    params = parameters()
    zero, *slopes = (jax.tree.map(lambda p, n=n: jnp.sin(n * p), params) for n in (0, 1, 2))
    rate = optax.linear_schedule(0.5, 0.0, 2)
    built = OPTIMIZERS[name].build(rate, labels, decays)
    expected = {name: -0.25 * 0.1 * leaf if decays(params)[name] else zero[name] for name, leaf in params.items()}
    chex.assert_trees_all_close(moved(built, zero, zero), expected, rtol=1e-5, atol=1e-6)
    updates, adamw = (moved(tx, *slopes) for tx in (built, AdamW().build(rate, decays=decays)))
    uses_labels = name in ("muon", "m3", "adamuon")
    for leaf in ("table", "scale"):
        assert jnp.allclose(updates[leaf], adamw[leaf], rtol=1e-4) == (uses_labels or name == "adamw"), leaf
    assert not jnp.allclose(updates["kernel"], adamw["kernel"], rtol=1e-3) or name == "adamw"


KNOWN = {
    "adamw": (AdamW(0.8, 0.9, weight_decay=0.2), optax.adamw(0.1, 0.8, 0.9, weight_decay=0.2, mask=decays)),
    "lion": (Lion(0.8, 0.9, weight_decay=0.2), optax.lion(0.1, 0.8, 0.9, weight_decay=0.2, mask=decays)),
    "sgd": (SGD(0.8, True, weight_decay=0.0), optax.sgd(0.1, 0.8, nesterov=True)),
    "muon": (
        Muon(0.8, True, weight_decay=0.2),
        optax.contrib.muon(0.1, beta=0.8, weight_decay=0.2, consistent_rms=0.2, adam_weight_decay=0.2),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_optaxs_optimizers_are_optaxs(name):
    row, known = KNOWN[name]
    slope = jax.tree.map(jnp.sin, parameters())
    other = jax.tree.map(jnp.cos, parameters())
    found, expected = (moved(tx, slope, other) for tx in (row.build(0.1, labels, decays), known))
    if name == "muon":  # optax decays all that is no matrix, and looks ahead there too
        found, expected = found["kernel"], expected["kernel"]
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_two_momenta_of_m3_are_those_of_its_settings():
    row = optim.M3(0.8, 0.9, slow_period=2, slow_decay=0.7, slow_weight=0.5, weight_decay=0.2)
    scales = (optim.MomentumScale(1, 0.8), optim.MomentumScale(2, 0.7, 0.5))
    fallback = optax.adamw(0.1, 0.8, 0.9, weight_decay=0.2, mask=decays)
    plain = optim.m3(0.1, scales, 0.9, matrices=labels, fallback=fallback, weight_decay=0.2, mask=decays)
    slopes = [jax.tree.map(lambda p, n=n: jnp.sin(n * p), parameters()) for n in (1.0, 2.0, 3.0)]
    chex.assert_trees_all_equal(moved(row.build(0.1, labels, decays), *slopes), moved(plain, *slopes))


@pytest.mark.parametrize(
    "name, setting, message",
    [
        ("adamw", {"b2": 1.0}, "b2 is 1; expected 0 or more and below 1"),
        ("adamw", {"weight_decay": -1.0}, "weight_decay is -1; expected 0 or more"),
        ("sgd", {"momentum": 1.5}, "momentum is 1.5"),
        ("muon", {"momentum": 1.0}, "momentum is 1"),
        ("m3", {"slow_period": 0}, "slow_period is 0; give a whole number of at least 1 .optimizer steps"),
        ("m3", {"slow_decay": 1.1}, "slow_decay is 1.1"),
        ("delta_momentum", {"erase": -1.0}, "erase is -1"),
        ("dmgd", {"hidden": 0}, "hidden is 0; give a whole number of at least 1 .features"),
        ("dmgd", {"inner_rate": -1.0}, "inner_rate is -1"),
        ("preconditioned_momentum", {"preconditioner_rate": 1.5}, "preconditioner_rate is 1.5"),
        ("lion", {"b1": float("nan")}, "b1 is nan"),
        ("delta_momentum", {"form": "grma"}, "form is 'grma'; expected one of"),
        ("dmgd", {"memory": "lin"}, "memory is 'lin'; expected one of"),
    ],
)
def test_a_setting_out_of_its_range_is_named_at_once(untyped, name, setting, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(OPTIMIZERS[name], **setting)


def flags(*given):
    """The optimizer that these flags of ``pretrain`` ask for."""
    return parse(PretrainConfig, ["--run", "x", *given], "pretrain").optimizer


def test_a_method_is_chosen_by_name_and_its_settings_are_flags_beside_it():
    chosen = flags("--optimizer.method", "m3", "--optimizer.slow-period", "9", "--optimizer.learning-rate", "1e-3")
    assert chosen == OptimizerConfig(optim.M3(slow_period=9), learning_rate=1e-3)
    assert flags("--optimizer.method=sgd", "--optimizer.nesterov").method == SGD(nesterov=True)
    assert flags("--optimizer.b2", "0.5").method == AdamW(b2=0.5)


@pytest.mark.parametrize(
    "given, message",
    [
        (["--optimizer.b2", "1"], "b2 is 1; expected 0 or more and below 1"),
        (["--optimizer.method", "adam"], "--optimizer.method is 'adam'; did you mean 'adamw'"),
        (["--optimizer.method"], "--optimizer.method is ''; known names: adamuon, adamw"),
        (["--optimizer.slow-period", "9"], "--optimizer.slow-period belongs to --optimizer.method m3 or adamuon"),
        (["--optimizer.method", "m3", "--optimizer.slow-perod", "9"], "did you mean '--optimizer.slow-period'"),
        (["--optimizer.method", "dmgd", "--optimizer.memory", "lin"], "expected one of ('mlp', 'linear')"),
    ],
)
def test_a_mistake_in_the_flags_is_one_sentence(given, message):
    with pytest.raises(UserError) as error:
        flags(*given)
    assert message in str(error.value) and "\n" not in str(error.value)
