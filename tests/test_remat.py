"""Rematerialised blocks: the gradient of a model that keeps everything, from fewer bytes."""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn

from hope_jax import train as training
from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.models import ARCHITECTURES, LanguageModel, Size, with_in_context
from hope_jax.train.remat import keeps_block_inputs

VOCAB = 32
SIZE = Size(width=16, layers=4, heads=2, vocab_size=VOCAB, context=32, levels=(Level(256),))
NAMES = ("transformer_pp", "hope", "titans", "gated_deltanet", "gdn_h1")
MODELS = {name: ARCHITECTURES[name](SIZE) for name in NAMES}
MODELS["levels in context"] = with_in_context(ARCHITECTURES["hope_attention"](SIZE), (16, 32))
ROWS = [pytest.param(name, marks=[] if name == "transformer_pp" else pytest.mark.slow) for name in MODELS]


def compiled(config, length, remat):
    """The gradient of the training loss of 2 sequences, with its parameters and tokens."""
    model = LanguageModel(config, remat)
    batch = np.random.default_rng(0).integers(0, VOCAB, (2, length + 1)).astype(np.int32)
    params = drawn(LanguageModel(config).init, batch[:, :1], spread=0.18, retention_bias=4.0)
    gradient: Any = jax.jit(jax.value_and_grad(training.next_token_loss(model, np.ones(VOCAB)), has_aux=True))
    return gradient.lower(params, batch).compile(), params, batch


@pytest.mark.parametrize("name", ROWS)
def test_rematerialised_blocks_give_the_loss_and_gradient_from_fewer_bytes(x64, name):
    config, found, used = dataclasses.replace(MODELS[name], dtype=jnp.float64), [], []
    for remat in (False, True):
        program, params, batch = compiled(config, 128, remat)
        found.append(jax.device_get(program(params, batch)))
        used.append(program.memory_analysis().temp_size_in_bytes)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), *found)
    assert used[1] < 0.9 * used[0]


@pytest.mark.slow
def test_hope_needs_at_most_one_and_a_half_times_the_bytes_of_a_transformer():
    bytes_of = {}
    for name in ("hope", "transformer_pp"):
        config = ARCHITECTURES[name](dataclasses.replace(SIZE, width=64, context=1024))
        programs = [compiled(config, 1024, remat)[0] for remat in (False, True)]
        bytes_of[name] = [program.memory_analysis().temp_size_in_bytes for program in programs]
        assert bytes_of[name][1] < 0.6 * bytes_of[name][0]
    assert bytes_of["hope"][1] <= 1.5 * bytes_of["transformer_pp"][1]


def test_blocks_are_rematerialised_where_memory_is_short_and_nothing_else_saves_it(monkeypatch, untyped):
    assert not keeps_block_inputs("auto", None)  # on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert keeps_block_inputs("auto", None) and not keeps_block_inputs("auto", 8)
    assert keeps_block_inputs("auto", None, "tpu") and not keeps_block_inputs("auto", None, "cpu")
    assert keeps_block_inputs("block", 8) and not keeps_block_inputs("none", None)
    with pytest.raises(UserError, match="remat is 'layer'; expected one of"):
        keeps_block_inputs(cast(Any, "layer"), None)
