"""Llama checkpoints against a slow numpy Llama on the same tensors, and what is refused."""

import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_logits import distance
from drawn import drawn
from llama_folders import CONFIG, LLAMA3, UNTIED, draw, write
from references_llama import llama

from hope_jax import optim
from hope_jax.errors import UserError
from hope_jax.interop import load, load_llama
from hope_jax.interop.tensors import INDEX, WEIGHTS
from hope_jax.nn.axes import matrices
from hope_jax.nn.config import ModelConfig
from hope_jax.nn.feed_forward.swiglu import SwiGLUConfig
from hope_jax.nn.language_model import LanguageModel
from hope_jax.nn.mixers.attention import AttentionConfig

TOKENS = np.random.default_rng(7).integers(0, CONFIG["vocab_size"], (2, 11))

# Changes of CONFIG, type of the stored tensors, shards.
ROWS = {
    "tied": ({}, "F32", 1),
    "tied, our eps, bfloat16": ({"rms_norm_eps": 1e-6}, "BF16", 1),
    "tied, large eps, float16, sharded": ({"rms_norm_eps": 1e-3}, "F16", 2),
    "untied": (UNTIED, "F32", 1),
    "untied, our eps, bfloat16, sharded": (UNTIED | {"rms_norm_eps": 1e-6}, "BF16", 3),
    "every head has its keys": ({"num_key_value_heads": 4}, "F32", 1),
    "all heads share their keys": (UNTIED | {"num_key_value_heads": 1}, "F32", 1),
    "slower features, as Llama 3.1": ({"rope_scaling": LLAMA3}, "F32", 1),
    "all features slower": ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "F32", 1),
}
# The others hold the same settings in other pairs.
QUICK = ("tied, large eps, float16, sharded", "untied, our eps, bfloat16, sharded", "all heads share their keys")
QUICK += ("slower features, as Llama 3.1", "all features slower")
rows = pytest.mark.parametrize(
    ("changes", "kind", "shards"),
    [pytest.param(*row, marks=() if name in QUICK else pytest.mark.slow, id=name) for name, row in ROWS.items()],
)


@functools.partial(jax.jit, static_argnames="config")
def read(config, params, tokens, state=None):
    """Logits and state."""
    return LanguageModel(config).apply({"params": params}, tokens, state)


def expected(tensors, config):
    """The reference's logits of TOKENS."""
    return np.stack([llama(tensors, config, row) for row in TOKENS])


@rows
def test_the_logits_are_those_of_a_slow_llama(x64, tmp_path, changes, kind, shards):
    stored = CONFIG | changes
    tensors = draw(stored, kind)
    config, params = load_llama(write(tmp_path, stored, tensors, shards), jnp.float64)
    theirs = expected(tensors, stored)
    assert distance(read(config, params, TOKENS)[0], theirs) < 1e-12
    other = expected(tensors, stored | {"rms_norm_eps": 2 * stored["rms_norm_eps"]})
    assert distance(other, theirs) > 1e-3, "eps must matter, or its absorption is not tested"


@pytest.mark.parametrize(
    ("dtype", "kind", "near", "tied"),
    [
        (jnp.float32, "F32", 1e-5, True),
        (jnp.float32, "BF16", 1e-5, True),
        (jnp.bfloat16, "BF16", 0.05, True),
        (jnp.bfloat16, "BF16", 0.05, False),
    ],
)
def test_models_of_fewer_bits_follow(tmp_path, dtype, kind, near, tied):
    stored = CONFIG | {"tie_word_embeddings": tied}
    tensors = draw(stored, kind)
    config, params = load_llama(write(tmp_path, stored, tensors), dtype)
    assert distance(read(config, params, TOKENS)[0], expected(tensors, stored)) < near


@pytest.mark.parametrize("changes", [pytest.param({}, marks=pytest.mark.slow), UNTIED], ids=["tied", "untied"])
def test_token_by_token_equals_the_whole(x64, tmp_path, changes):
    stored = CONFIG | changes
    config, params = load_llama(write(tmp_path, stored, draw(stored)), jnp.float64)
    whole, _ = read(config, params, TOKENS)
    state, logits = LanguageModel(config).init_state(params, batch=2), []
    for t in range(TOKENS.shape[1]):
        out, state = read(config, params, TOKENS[:, t : t + 1], state)
        logits.append(out)
    np.testing.assert_allclose(np.concatenate(logits, axis=1), whole, rtol=0, atol=1e-12 * np.max(np.abs(whole)))
    assert state.mixer.cache.keys.shape[3] == CONFIG["max_position_embeddings"]


@pytest.mark.parametrize(("changes", "dtype"), [({}, jnp.float32), (UNTIED, jnp.bfloat16)], ids=["tied", "untied"])
def test_the_parameters_are_shaped_as_init_shapes_them(x64, tmp_path, dtype, changes):
    stored = CONFIG | changes
    config, params = load_llama(write(tmp_path, stored, draw(stored, "F16")), dtype)
    shaped = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), TOKENS[:, :1])["params"]

    def describe(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert describe(params) == describe(shaped)


def test_where_the_rotary_base_may_stand(tmp_path):
    stored = {name: value for name, value in CONFIG.items() if name != "rope_theta"}
    tensors, bases = draw(CONFIG), []
    for changes in (
        {},
        {"rope_theta": 500.0, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ):
        config, _ = load_llama(write(tmp_path, stored | changes, tensors))
        bases.append(config.mixer.rope_base)
    assert bases == [10_000.0, 500.0, 500.0]


def test_a_tied_checkpoint_may_hold_its_head_too_if_it_is_the_embedding(tmp_path):
    tensors = draw(CONFIG)
    _, plain = load_llama(write(tmp_path, CONFIG, tensors))
    table = tensors["model.embed_tokens.weight"]
    _, params = load_llama(write(tmp_path, CONFIG, tensors | {"lm_head.weight": table.copy()}))
    assert jax.tree.all(jax.tree.map(np.array_equal, params, plain))
    with pytest.raises(UserError, match="lm_head.weight is left over: .*tied, and it differs from model.embed_tokens"):
        load_llama(write(tmp_path, CONFIG, tensors | {"lm_head.weight": table * np.float32(1.001)}))


@pytest.mark.parametrize("dtype", ["int32", "floaty", None])
def test_a_type_that_is_none_of_floats_is_refused(tmp_path, untyped, dtype):
    with pytest.raises(UserError, match="dtype is .*expected a type of floats"):
        load_llama(write(tmp_path, CONFIG, draw(CONFIG)), dtype or object())


def test_rotary_speeds_of_older_files_may_stand_there_if_they_follow_from_the_base(tmp_path):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    speeds = (500.0 ** (-np.arange(4) / 4)).astype(np.float32)
    load_llama(write(tmp_path, CONFIG, draw(CONFIG) | {name: speeds}))
    with pytest.raises(UserError, match=f"{name} is left over"):
        load_llama(write(tmp_path, CONFIG, draw(CONFIG) | {name: 1.1 * speeds}))
    scaled = CONFIG | {"rope_scaling": {"type": "linear", "factor": 4.0}}
    for there in (speeds, speeds / 4):  # older files hold those of the base, whatever the scaling
        load_llama(write(tmp_path, scaled, draw(scaled) | {name: there}))
    with pytest.raises(UserError, match=f"{name} is left over"):
        load_llama(write(tmp_path, scaled, draw(scaled) | {name: speeds / 2}))


# ---------------------------------------------------------------- refusals

Q0, DOWN1 = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"


def _text(file, text):
    return lambda folder: (folder / file).write_text(text)


def _pipe(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def _tensors(change):
    """Write the tensors again after ``change`` altered them."""

    def alter(folder):
        tensors = draw(CONFIG)
        change(tensors)
        write(folder, CONFIG, tensors)

    return alter


def _shards(change):
    """Write two shards in place of the one file, then ``change(folder)``."""

    def alter(folder):
        (folder / WEIGHTS).unlink()
        write(folder, CONFIG, draw(CONFIG), shards=2)
        change(folder)

    return alter


FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
FILES = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
    "config a pipe": (_pipe, "config.json is no file; expected a JSON file of a Llama checkpoint.$"),
    "config no JSON": (_text("config.json", "{'a': 1}"), "config.json is not JSON"),
    "config no text": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), "is not JSON"),
    "config a list": (_text("config.json", "[1]"), "holds a JSON list"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"neither {WEIGHTS} nor {INDEX}"),
    "weights cut": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8]), "no whole"),
    "weights empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "no whole safetensors file"),
    "missing": (_tensors(lambda tensors: tensors.pop(Q0)), f"{Q0} is missing"),
    "transposed": (_tensors(lambda t: t.update({DOWN1: t[DOWN1].T.copy()})), rf"{DOWN1} has the shape \[48, 32\]"),
    "integers": (_tensors(lambda t: t.update({Q0: t[Q0].astype(np.int8)})), f"{Q0} is of type I8"),
    "left over": (_tensors(lambda t: t.update(extra=t[Q0])), "extra is left over"),
    "bias": (_tensors(lambda t: t.update({Q0[:-6] + "bias": np.zeros(32)})), "q_proj.bias is left over"),
    "head": (_tensors(lambda t: t.update({"lm_head.weight": t[Q0]})), "lm_head.weight is left over.*tied"),
    "shard gone": (_shards(lambda folder: (folder / SECOND).unlink()), f"{SECOND} is missing"),
    "shards alike": (_shards(lambda f: (f / SECOND).write_bytes((f / FIRST).read_bytes())), "in two files"),
    "index no JSON": (_shards(_text(INDEX, "{")), f"{INDEX} is not JSON"),
    "no map": (_shards(_text(INDEX, "{}")), f"{INDEX} has no weight_map"),
    "map of numbers": (_shards(_text(INDEX, json.dumps({"weight_map": {Q0: 1}}))), f"{INDEX} has no weight_map"),
    "map of one file": (_shards(_text(INDEX, json.dumps({"weight_map": {Q0: FIRST}}))), "is missing"),
}


@pytest.mark.parametrize(("alter", "words"), FILES.values(), ids=FILES)
def test_files_that_do_not_hold_the_model_are_refused(tmp_path, alter, words):
    write(tmp_path, CONFIG, draw(CONFIG))
    alter(tmp_path)
    with pytest.raises(UserError, match=words):
        load_llama(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_llama(tmp_path / "nowhere")


# ---------------------------------------------------------------- a head of its own


def test_an_untied_model_scores_with_its_head_alone_and_trains_it_as_an_embedding():
    config = ModelConfig(AttentionConfig(2), SwiGLUConfig(8), width=8, layers=1, vocab_size=9, tied=False)
    tokens = jnp.array([[1, 2, 3]])
    params = drawn(LanguageModel(config).init, tokens)
    slopes = jax.jit(jax.grad(lambda params: jnp.sum(read(config, params, tokens)[0][..., 5])))(params)

    def used(table):
        return np.flatnonzero(np.any(np.asarray(table) != 0, axis=1)).tolist()

    assert used(slopes["head"].T) == [5] and used(slopes["embedding"]) == [1, 2, 3]
    labels = matrices(LanguageModel(config).axes())(params)
    assert labels["head"] == labels["embedding"] == optim.matrix_labels()(params)["head"] == "adamw"


def test_load_recognises_the_architecture(tmp_path):
    write(tmp_path, CONFIG, draw(CONFIG))
    config, params = load(tmp_path, jnp.bfloat16)
    same, expected_params = load_llama(tmp_path, jnp.bfloat16)
    assert config == same and jax.tree.all(jax.tree.map(np.array_equal, params, expected_params))


@pytest.mark.parametrize("kind", ["mixtral", None, ["llama"]])
def test_an_architecture_that_is_not_known_is_refused_with_those_that_are(tmp_path, kind):
    write(tmp_path, CONFIG | {"model_type": kind}, draw(CONFIG))
    with pytest.raises(UserError, match=r"config.json has model_type=.*; those that can be read are llama"):
        load(tmp_path)
