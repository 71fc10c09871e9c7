"""The named models: their sizes, and what every architecture must do at a small one."""

import functools
import math
from dataclasses import replace
from typing import Any

import architectures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from parameter_counts import PARAMETERS

from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.memory.architectures import Architecture
from hope_jax.models import (
    ARCHITECTURES,
    MODELS,
    SIZES,
    LanguageModel,
    ModelConfig,
    Size,
)
from hope_jax.nn.language_model import body_of, entry
from hope_jax.nn.mixers.attention import AttentionConfig

COUNTS = {f"{name}-{size}": n for name, row in PARAMETERS.items() for size, n in zip(SIZES, row, strict=True)}

B, T, VOCAB = 2, 20, 48
SMALL = Size(width=32, layers=2, heads=2, vocab_size=VOCAB, context=64, levels=(Level(16), Level(32)))
each = pytest.mark.parametrize("name", architectures.rows("hope", "transformer_conv"))


def count(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def test_every_model_has_a_pinned_parameter_count():
    assert set(COUNTS) == set(MODELS)


# The formulas are those of every size: one of them is enough for each edit of the code.
COUNTED = [pytest.param(n, marks=() if n.endswith("-1.3b") else pytest.mark.slow) for n in MODELS]


def outside(model):
    """Parameters around the blocks in units of the width, by the model's fields; whole models are counted below."""
    tables, norms = (1 if model.tied else 2), 1 + model.embedding_norm
    return tables * model.vocab_size + norms * (2 if model.norm == "layer" else 1)


@pytest.mark.parametrize("name", COUNTED)
def test_the_parameter_count_is_the_pinned_one(name):
    model = MODELS[name]
    x = jax.ShapeDtypeStruct((1, 1, model.width), model.dtype)
    pattern = jax.eval_shape(lambda k, x: body_of(model)(model).init(k, entry(model, x), None), jax.random.key(0), x)
    blocks = model.layers // len(model.pattern) * count(pattern)
    assert blocks + outside(model) * model.width == COUNTS[name]


@pytest.mark.parametrize("name", architectures.rows("transformer_conv"))
def test_a_whole_model_has_the_pinned_parameters(name):
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(LanguageModel(MODELS[f"{name}-tiny"]).init, jax.random.key(0), tokens)
    assert count(variables["params"]) == COUNTS[f"{name}-tiny"]


@pytest.mark.parametrize("size", SIZES)
def test_baselines_are_within_three_percent_of_hope(size):
    for name in ARCHITECTURES:
        assert abs(COUNTS[f"{name}-{size}"] / COUNTS[f"hope-{size}"] - 1) < 0.03, name


# ---------------------------------------------------------------- every architecture, small, in float64


@functools.cache
def started(name):
    """Tokens that differ from one another inside a row; of a bfloat16 model: logits of them, and its parameters.

    Parameters are made for one token, which is a smaller program. Logits where float64 is enabled, too: there a model
    of narrow types meets positions of other types. Without it narrow models are trained in many other tests.
    """
    tokens = np.stack([np.random.default_rng(i).permutation(VOCAB - 1)[:T] + 1 for i in range(B)]).astype(np.int32)
    model = LanguageModel(replace(ARCHITECTURES[name](SMALL), dtype=jnp.bfloat16))
    with jax.enable_x64(False):
        variables = jax.jit(model.init)(jax.random.key(0), tokens[:, :1])
    with jax.enable_x64(True):
        logits, _ = jax.jit(model.apply)(variables, tokens)
    return tokens, logits, variables["params"]


@functools.cache
def small(name):
    """The float64 model, parameters and tokens.

    Of Hope in plain products, and projections and gates have one layer: ``test_self_modifying.py`` and
    ``test_mixers.py`` have the others, which take long to compile.
    """
    tokens, _, params = started(name)
    config: Any = replace(ARCHITECTURES[name](SMALL), dtype=jnp.float64)
    if name != "hope":
        return LanguageModel(config), jax.tree.map(lambda p: np.asarray(p, np.float64), params), tokens
    boxes = dict(projection=Architecture(1, True, (0.5,)), gate=Architecture(1, False, (1.0,)))
    model = LanguageModel(replace(config, mixer=replace(config.mixer, impl="chunked", **boxes)))
    return model, drawn(model.init, tokens[:, :1]), tokens


@functools.cache
def pulled(name):
    """Compiled (parameters, tokens, cotangent of the logits) -> (logits, gradients, (first, last state)), fresh."""
    model = small(name)[0]

    @jax.jit
    def pulled(params, tokens, cotangent):
        logits, pull, state = jax.vjp(lambda p: model.apply({"params": p}, tokens), params, has_aux=True)
        return logits, pull(cotangent)[0], (model.init_state(params, batch=B, capacity=T), state)

    return pulled


@each
def test_any_cut_with_any_padding_gives_the_same_logits_and_final_state_and_no_state_is_a_fresh_one(x64, name):
    model, params, tokens = small(name)
    fresh, _, (state, end) = pulled(name)(params, tokens, np.zeros((B, T, VOCAB)))
    step, at, logits = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs)), 0, []
    # Nine tokens, of which the first ones are read, or one token; Hope's single one is in ``test_self_modifying.py``.
    for count in (9, 6, 5) if name == "hope" else (9, None, 6, 3, None):
        piece = np.roll(tokens, -at, axis=1)[:, : 9 if count else 1]
        out, state = step(params, piece, state, *([np.int32(count)] if count else []))
        logits.append(np.asarray(out)[:, :count])
        at += count or 1
    assert fresh.dtype == jnp.float64
    np.testing.assert_allclose(np.concatenate(logits, axis=1), fresh, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(*map(jax.tree.leaves, (state, end)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@each
def test_logits_depend_on_the_past_alone_by_gradients(x64, name):
    _, params, tokens = small(name)
    params = jax.tree.map(lambda x: x + 0.01 * np.random.default_rng(0).normal(size=x.shape), params)  # none is 0
    t, unseen = 13, 0  # id 0 occurs nowhere, so other rows of the tied table matter as inputs only
    cotangent = np.zeros((B, T, VOCAB))
    cotangent[0, t, unseen] = 1
    _, gradients, _ = pulled(name)(params, tokens, cotangent)
    moved = np.sum(np.abs(np.array(gradients["embedding"])), axis=1)
    seen = np.array(tokens[0, : t + 1])
    assert np.all(moved[seen] > 0)
    others = np.setdiff1d(np.arange(1, VOCAB), seen)
    assert np.all(moved[others] == 0)


@each
def test_the_loss_falls_over_twenty_steps(x64, name):
    _, params, tokens = small(name)
    targets, losses = np.eye(VOCAB)[np.roll(tokens, -1, axis=1)], []
    for _ in range(20):
        logits = np.asarray(pulled(name)(params, tokens, np.zeros((B, T, VOCAB)))[0])
        logs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        losses.append(-np.mean(np.sum(targets * logs, axis=-1)))
        _, gradients, _ = pulled(name)(params, tokens, (np.exp(logs) - targets) / (B * T))
        gradients = jax.tree.map(np.asarray, gradients)
        norm = math.sqrt(sum(np.sum(g * g) for g in jax.tree.leaves(gradients)))
        scale = 0.3 / max(norm, 0.3)
        params = jax.tree.map(lambda p, g, s=scale: p - s * g, params, gradients)
    assert losses[-1] < 0.8 * losses[0], losses


@each
def test_a_bfloat16_model_gives_finite_float32_logits_and_has_float32_parameters(name):
    _, logits, params = started(name)
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert logits.dtype == jnp.float32
    assert np.all(np.isfinite(logits)) and np.std(logits) > 0.1
    assert np.any(logits != logits.astype(jnp.bfloat16)), "rounded before the loss sees them"


def bits_over_uniform(logits):
    """The loss of a target drawn at random, less that of the uniform distribution, in bits per token."""
    logits = np.asarray(logits, np.float64)
    nats = np.logaddexp.reduce(logits, axis=-1) - np.mean(logits, axis=-1)
    return np.mean(nats) / math.log(2) - math.log2(logits.shape[-1])


@each
def test_an_untrained_model_starts_at_the_uniform_loss(name):
    assert 0 <= bits_over_uniform(started(name)[1]) < 0.1


@pytest.mark.parametrize(("vocab", "width"), [(256, 1024), (8192, 512), pytest.param(256, 192, marks=pytest.mark.slow)])
def test_a_token_hardly_scores_itself_at_the_start_whatever_the_vocabulary_and_width(vocab, width):
    model, tokens = LanguageModel(ModelConfig(AttentionConfig(1), None, width, 1, vocab)), jnp.arange(64)[None]

    def without_blocks(key):
        params: Any = model.init(key, tokens[:, :1])["params"]
        params["blocks"]["mixer"]["out"]["kernel"] *= 0
        return model.apply({"params": params}, tokens)[0]

    assert 0 <= bits_over_uniform(jax.jit(without_blocks)(jax.random.key(0))) < 0.1


@pytest.mark.slow
def test_a_float32_hope_reads_any_length_where_float64_is_enabled(x64):
    tokens, _, params = started("hope")
    logits, _ = jax.jit(LanguageModel(ARCHITECTURES["hope"](SMALL)).apply)({"params": params}, tokens)
    assert logits.dtype == jnp.float32 and np.all(np.isfinite(logits))


@each
def test_an_unknown_id_in_a_compiled_program_gives_nan_and_not_a_number_that_looks_right(x64, name):
    _, params, tokens = small(name)
    wrong = tokens.copy()
    wrong[0, 1] = VOCAB
    logits = [np.asarray(pulled(name)(params, ids, np.zeros((B, T, VOCAB)))[0]) for ids in (tokens, wrong)]
    assert np.all(np.isfinite(logits[0])) and np.all(np.isfinite(logits[1][1]))
    assert np.all(np.isnan(logits[1][0, 1:]))


# ---------------------------------------------------------------- mistakes

WRONG = {
    "float tokens": (jnp.zeros((1, 2)), "float"),
    "empty batch": (jnp.zeros((0, 2), jnp.int32), r"\(0, 2\)"),
    "empty sequence": (jnp.zeros((1, 0), jnp.int32), r"\(1, 0\)"),
    "id too large": (jnp.asarray([[0, VOCAB]]), str(VOCAB)),
    "negative id": (jnp.asarray([[-1, 0]]), "-1"),
}


@pytest.mark.parametrize(("tokens", "message"), WRONG.values(), ids=WRONG)
def test_tokens_no_model_can_read_are_refused(untyped, tokens, message):
    model = LanguageModel(ARCHITECTURES["transformer_pp"](SMALL))
    with pytest.raises(UserError, match=message):
        model.init(jax.random.key(0), tokens)


def test_a_state_of_no_sequences_is_refused():
    with pytest.raises(UserError, match="batch is 0"):
        LanguageModel(ARCHITECTURES["transformer_pp"](SMALL)).init_state({}, batch=0)


@pytest.mark.parametrize("field", ["width", "layers", "vocab_size", "context"])
def test_a_model_needs_positive_sizes(field):
    with pytest.raises(UserError, match=f"{field} is 0"):
        replace(MODELS["hope-tiny"], **{field: 0})


def test_levels_are_stepped_once_per_period_in_batches():
    every = MODELS["hope-tiny"].update_every(1024)
    assert every == {"static": 1, "level_0": 2, "level_1": 8}
    assert MODELS["titans-tiny"].update_every(1024) == {"static": 1}
