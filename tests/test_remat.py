"""Rematerialised blocks, and nested loops inside: the gradient of a model that keeps everything, from fewer bytes."""

import dataclasses
import functools
import re
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
from hope_jax.train.remat import chosen_remat, what_is_kept

VOCAB = 32
SIZE = Size(width=16, layers=4, heads=2, vocab_size=VOCAB, context=32, levels=(Level(256),))
NAMES = ("transformer_pp", "hope", "titans", "gated_deltanet", "gdn_h1")
MODELS = {name: ARCHITECTURES[name](SIZE) for name in NAMES}
MODELS["levels in context"] = with_in_context(ARCHITECTURES["hope_attention"](SIZE), (16, 32))
ROWS = [pytest.param(name, marks=[] if name == "transformer_pp" else pytest.mark.slow) for name in MODELS]


def compiled(config, length, remat, nested=False):
    """The gradient of the training loss of 2 sequences, with its parameters and tokens."""
    model = LanguageModel(config, remat, nested=nested)
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
@pytest.mark.parametrize("name", ["hope", "titans"])
def test_nested_loops_give_the_gradient_of_all_states(x64, name):
    """16 chunks of 16 tokens, 4 in each inner loop; with one head states are larger than what a chunk reads."""
    config = dataclasses.replace(ARCHITECTURES[name](dataclasses.replace(SIZE, heads=1)), dtype=jnp.float64)
    found, loops = [], []
    for nested in (False, True):
        program, params, batch = compiled(config, 256, True, nested)
        found.append(jax.device_get(program(params, batch)))
        loops.append(program.as_text().count(" while("))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), *found)
    assert loops[1] > loops[0]


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
    assert chosen_remat("auto", None) == "none"  # on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert chosen_remat("auto", None) == "nested" and chosen_remat("auto", 8) == "none"
    assert [chosen_remat("auto", None, platform) for platform in ("tpu", "gpu", "cpu")] == ["nested", "block", "none"]
    assert chosen_remat("block", 8) == "block" and chosen_remat("none", None) == "none"
    assert what_is_kept(MODELS["hope"], "auto", None, "tpu").startswith("nested: the input of every block, ")
    assert what_is_kept(MODELS["transformer_pp"], "auto", None, "tpu") == "block: the input of every block"
    assert what_is_kept(MODELS["hope"], "block", 8, "cpu") == "block: the input of every block, of pieces of 8 tokens"
    with pytest.raises(UserError, match="remat is 'layer'; expected one of"):
        chosen_remat(cast(Any, "layer"), None)


def test_the_choice_reaches_the_loss_that_is_trained():
    """A loop over 16 chunks, or 4 times over 4."""
    run = training.TextRun(MODELS["hope"], training.OptimizerConfig(), 2, 256, 0, "", "")

    def lengths(remat):
        setup = training.text_setup(run, 10, np.ones(VOCAB), remat=remat)
        batch = jax.ShapeDtypeStruct((2, 257), jnp.int32)
        return set(re.findall(r"length=(\d+)", str(jax.make_jaxpr(setup.loss)(setup.shapes().params, batch))))

    assert "16" in lengths("block") and "16" not in lengths("nested")
