"""Checkpoints of Mamba-2, Gated DeltaNet and Qwen3-Next's layers against slow numpy models on the same tensors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_checkpoints as references
from checkpoint_logits import distance, read
from llama_folders import UNTIED, write
from matrix_folders import GATED_DELTANET, MAMBA2, QWEN3_NEXT, draw

from hope_jax.errors import UserError
from hope_jax.interop import load, load_qwen3_next_layer
from hope_jax.interop.tensors import INDEX, WEIGHTS
from hope_jax.nn.feed_forward.swiglu import SwiGLUConfig
from hope_jax.nn.language_model import LanguageModel

TOKENS = np.random.default_rng(7).integers(0, 40, (2, 11))
CLIPPED = {"time_step_limit": [0.02, 0.05]}
ROWS = {  # configuration, type of the stored tensors, shards
    "mamba2": (MAMBA2, "F16", 1),
    "mamba2, all else": (MAMBA2 | UNTIED | CLIPPED | {"n_groups": 2, "layer_norm_epsilon": 1e-3}, "F32", 2),
    "gated_deltanet": (GATED_DELTANET, "BF16", 1),
    "gated_deltanet, all else": (GATED_DELTANET | UNTIED | {"num_v_heads": 4, "norm_eps": 1e-3}, "F32", 2),
}


def expected(tensors, config, **changes):
    """The reference's logits of TOKENS."""
    reference = getattr(references, config["model_type"])
    return np.stack([reference(tensors, config, row, **changes) for row in TOKENS])


@pytest.mark.parametrize(("stored", "kind", "shards"), ROWS.values(), ids=ROWS)
def test_the_logits_are_those_of_a_slow_model_that_reads_the_stored_names(x64, tmp_path, stored, kind, shards):
    tensors = draw(stored, kind)
    config, params = load(write(tmp_path, stored, tensors, shards), jnp.float64)
    theirs = expected(tensors, stored)
    assert distance(read(config, params, TOKENS), theirs) < 1e-12
    shaped = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), TOKENS[:, :1])["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shaped)
    (eps,) = (name for name in ("layer_norm_epsilon", "norm_eps") if name in stored)
    for other in (expected(tensors, stored, inner=2 * stored[eps]), expected(tensors, stored | {eps: 2 * stored[eps]})):
        assert distance(other, theirs) > 1e-7, "both epsilons must matter, or they are not tested"


def test_the_layer_of_qwen3_next_is_the_slow_one_and_needs_its_own_file_alone(x64, tmp_path):
    place, u = "model.layers.4.linear_attn.", np.random.default_rng(1).normal(size=(2, 11, 16))
    tensors = draw(QWEN3_NEXT)
    write(tmp_path, QWEN3_NEXT, tensors)
    (tmp_path / WEIGHTS).rename(tmp_path / "here.safetensors")
    places = dict.fromkeys(tensors, "here.safetensors") | {"model.layers.5.mlp.gate.weight": "elsewhere.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    mixer, params = load_qwen3_next_layer(tmp_path, 4, jnp.float64)
    layer = mixer.build(16, jnp.float64)
    y, _ = jax.jit(layer.apply)({"params": params}, u, layer.init_state(2, 0))
    theirs = [references.qwen3_next_layer(references.below(tensors, place), QWEN3_NEXT, row) for row in u]
    np.testing.assert_allclose(y, np.stack(theirs), rtol=0, atol=1e-12)


def test_the_embedding_of_mamba_2_has_two_names(tmp_path):
    tensors = draw(MAMBA2)
    _, params = load(write(tmp_path, MAMBA2, tensors))
    table = tensors.pop("backbone.embeddings.weight")
    tensors["backbone.embedding.weight"] = table
    _, same = load(write(tmp_path, MAMBA2, tensors))
    assert np.array_equal(same["embedding"], params["embedding"])
    with pytest.raises(UserError, match="has backbone.embeddings.weight in two files or by two names"):
        load(write(tmp_path, MAMBA2, tensors | {"backbone.embeddings.weight": table.copy()}))


def test_infinite_steps_are_written_in_two_ways(tmp_path):
    limits = [[0.0, {"__float__": "Infinity"}], [0.0, float("inf")]]
    stored = [MAMBA2 | {"time_step_limit": limit} for limit in limits]
    assert len({load(write(tmp_path, config, draw(config)))[0] for config in stored}) == 1


def test_hidden_features_that_are_not_stated_follow_from_the_ratio(tmp_path):
    stored = GATED_DELTANET | {"intermediate_size": 256}
    for ratio in (8, 8.0, 15.5):
        write(tmp_path, stored | {"intermediate_size": None, "hidden_ratio": ratio}, draw(stored))
        assert load(tmp_path)[0].feed_forward == SwiGLUConfig(256)
    write(tmp_path, stored | {"hidden_ratio": "unused"}, draw(stored))
    assert load(tmp_path)[0].feed_forward == SwiGLUConfig(256)


def test_a_path_that_is_no_checkpoint_is_told_as_such(tmp_path):
    with pytest.raises(UserError, match="typo does not exist; expected the folder of a checkpoint"):
        load(tmp_path / "typo")
    with pytest.raises(UserError, match="has neither config.json nor model.safetensors"):
        load(tmp_path)
    (tmp_path / WEIGHTS).touch()
    with pytest.raises(UserError, match="safetensors is no folder"):
        load(tmp_path / WEIGHTS)


# ---------------------------------------------------------------- refusals

REFUSED = {
    "bias": (MAMBA2, {"use_bias": True}, "use_bias=True; only False"),
    "no bias": (MAMBA2, {"use_conv_bias": False}, "use_conv_bias=False; only True"),
    "activation": (MAMBA2, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "widths": (MAMBA2, {"head_dim": 16}, r"expand \* hidden_size = 2 \* 16 .*num_heads \* head_dim = 4 \* 16"),
    "groups": (MAMBA2, {"n_groups": 3}, "n_groups=3, which does not divide num_heads=4"),
    "steps": (MAMBA2, {"time_step_limit": [0.1, 0.1]}, r"time_step_limit=\[0.1, 0.1\]; expected two numbers, 0 <= low"),
    "steps of words": (MAMBA2, {"time_step_limit": ["a", "b"]}, "time_step_limit=.*expected two numbers"),
    "one step": (MAMBA2, {"time_step_limit": 0.1}, "time_step_limit=0.1; expected two numbers"),
    "no state": (MAMBA2, {"state_size": None}, "state_size=None"),
    "unknown": (MAMBA2, {"num_experts": 8}, "num_experts=8, which this reader does not know"),
    "more state": (
        MAMBA2,
        {"state_size": 8},
        r"in_proj.weight has the shape \[80, 16\]; the model needs \[84, 16\]",
    ),
    "gate": (GATED_DELTANET, {"use_gate": False}, "use_gate=False; only True"),
    "convolution": (GATED_DELTANET, {"use_short_conv": False}, "use_short_conv=False; only True"),
    "rates": (GATED_DELTANET, {"allow_neg_eigval": True}, "allow_neg_eigval=True; only False"),
    "hybrid": (GATED_DELTANET, {"attn": {"layers": [1]}}, "attn=.*; only None"),
    "ratio": (GATED_DELTANET, {"intermediate_size": None, "hidden_ratio": 0}, "hidden_ratio=0; expected a positive"),
    "value heads": (GATED_DELTANET, {"num_v_heads": 3}, "num_v_heads=3, which num_heads=2 does not divide"),
    "value size": (GATED_DELTANET, {"expand_v": 1.4}, "head_dim=6 and expand_v=1.4; expected a whole number"),
    "eps": (GATED_DELTANET, {"norm_eps": -1}, "norm_eps=-1; expected a positive number"),
    "two layers": (GATED_DELTANET, {"num_hidden_layers": 1}, r"model.layers.1.* is left over"),
}


@pytest.mark.parametrize(("stored", "changes", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_the_plain_architecture_is_refused(tmp_path, stored, changes, words):
    write(tmp_path, stored | changes, draw(stored))
    with pytest.raises(UserError, match=words):
        load(tmp_path)


LAYERS = {
    "attention": (3, {}, "index is 3; the blocks with linear attention are 0, 1, 2, 4, 5, 6"),
    "listed": (4, {"layer_types": ["full_attention"] * 7 + ["linear_attention"]}, "index is 4; .* are 7"),
    "beyond": (8, {}, "index is 8"),
    "a truth value": (True, {}, "index is True; give a whole number of at least 0"),
    "no list": (4, {"layer_types": "linear_attention"}, "layer_types='linear_attention'; expected a list"),
    "attention alone": (4, {"layer_types": ["full_attention"] * 8}, "index is 4; .* are none"),
    "elsewhere": (5, {}, r"The tensor model.layers.5.linear_attn.A_log is missing \(7 in all\)"),
    "heads": (4, {"linear_num_value_heads": 3}, "linear_num_value_heads=3, which linear_num_key_heads=2 does not"),
    "other model": (4, {"model_type": "qwen3"}, "model_type='qwen3'; only 'qwen3_next'"),
    "activation": (4, {"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
    "taps": (4, {"linear_conv_kernel_dim": 3}, r"conv1d.weight has the shape \[44, 1, 4\].*\[44, 1, 3\]"),
}


@pytest.mark.parametrize(("index", "changes", "words"), LAYERS.values(), ids=LAYERS)
def test_layers_that_are_not_there_or_not_of_that_kind_are_refused(tmp_path, index, changes, words):
    write(tmp_path, QWEN3_NEXT | changes, draw(QWEN3_NEXT))
    with pytest.raises(UserError, match=words):
        load_qwen3_next_layer(tmp_path, index)


def test_the_whole_of_qwen3_next_is_refused_and_so_is_a_tensor_that_no_layer_has(tmp_path):
    tensors = draw(QWEN3_NEXT)
    with pytest.raises(UserError, match="experts and gated attention; load_qwen3_next_layer reads"):
        load(write(tmp_path, QWEN3_NEXT, tensors))
    tensors["model.layers.4.linear_attn.extra"] = np.zeros(3)
    with pytest.raises(UserError, match="linear_attn.extra is left over"):
        load_qwen3_next_layer(write(tmp_path, QWEN3_NEXT, tensors), 4)
