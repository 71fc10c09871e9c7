"""``config.json`` of Llama checkpoints: what is used, what may stand there, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from llama_folders import CONFIG, LLAMA3, UNTIED, draw, write
from references_llama import rotary_speeds

from hope_jax.errors import UserError
from hope_jax.interop import load_llama
from hope_jax.interop.llama_config import read_llama
from hope_jax.nn.rotary import RopeScaling, rope_speeds


@pytest.mark.parametrize("place", ["rope_theta", "rope_scaling", "rope_parameters"])
def test_the_base_is_used_wherever_it_stands(tmp_path, place):
    base = 500.0 if place == "rope_theta" else {"rope_type": "default", "rope_theta": 500.0}
    stored = {name: value for name, value in CONFIG.items() if name != "rope_theta"} | {place: base}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert read_llama(tmp_path / "config.json").rope_base == 500.0


@pytest.mark.parametrize(
    "scaling", [{"type": "linear", "factor": 1.0}, LLAMA3 | {"factor": 1}], ids=["linear", "llama3"]
)
def test_scaling_by_one_is_the_plain_model(tmp_path, scaling):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"rope_scaling": scaling}))
    assert read_llama(tmp_path / "config.json").rope_scaling is None


def test_the_speeds_of_llama_3_are_those_of_its_rule(x64):
    """With the numbers of Llama 3.1: 128 features a head, of which some are kept, some slowed, some in between."""
    stored = LLAMA3 | {"original_max_position_embeddings": 8192}
    expected_speeds = rotary_speeds(128, 500_000.0, stored)
    speeds = rope_speeds(128, 500_000.0, RopeScaling(8.0, 8192, 1.0, 4.0), jnp.float64)
    np.testing.assert_allclose(speeds, expected_speeds, rtol=1e-13)
    ratio = rotary_speeds(128, 500_000.0) / expected_speeds
    assert (ratio == 1).any() and (ratio == 8).any() and ((ratio > 1.01) & (ratio < 7.99)).any()


def test_fields_that_change_nothing_may_stand_there(tmp_path):
    more = {"torch_dtype": "bfloat16", "use_cache": True, "_name_or_path": "x", "pruned_heads": {}, "is_decoder": False}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | more))
    assert read_llama(tmp_path / "config.json").width == CONFIG["hidden_size"]


CONFIGS = {
    "rope without its numbers": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor=None"),
    "rope turned round": ({"rope_scaling": LLAMA3 | {"low_freq_factor": 5.0}}, "rope_scaling=.*0 < low < high"),
    "rope of a factor below 1": ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "at least 1"),
    "rope of two types": ({"rope_scaling": {"type": "linear", "rope_type": "default"}}, "contradicts itself"),
    "rope of a list": ({"rope_scaling": {"type": ["linear"]}}, "only rotary positions of the types"),
    "rope of half a token": ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0.5}}, "number of tokens"),
    "two bases": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "contradicts itself: .*500"),
    "an older base": ({"rope_scaling": {"rope_type": "default", "rope_theta": 1e4}}, "contradicts itself: .*10000"),
    "two scalings": ({"rope_scaling": LLAMA3, "rope_parameters": {"type": "default"}}, "contradicts itself"),
    "base beyond float32": ({"rope_theta": 1e39}, "rope_theta=1e[+]39"),
    "eps below float32": ({"rms_norm_eps": 1e-40}, "rms_norm_eps=1e-40"),
    "a field nobody knows": ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0, which this reader does not"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "scaled rope, newer": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0}}, "rope_parameters=.*yarn"),
    "rope of another kind": ({"rope_scaling": "dynamic"}, "rope_scaling='dynamic'"),
    "part of the features": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "attention bias": ({"attention_bias": True}, "attention_bias=True"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias=True"),
    "head size": ({"head_dim": 16}, "head_dim=16"),
    "heads do not divide": ({"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads=5"),
    "groups do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    "odd heads": ({"num_attention_heads": 32, "num_key_value_heads": 32}, "multiple of 64"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "model type": ({"model_type": "mistral"}, "model_type='mistral'"),
    "no model type": ({"model_type": None}, "model_type=None"),
    "architecture": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "no width": ({"hidden_size": None}, "hidden_size=None"),
    "layers": ({"num_hidden_layers": 2.0}, "num_hidden_layers=2.0"),
    "layers true": ({"num_hidden_layers": True}, "num_hidden_layers=True"),
    "no context": ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
    "eps": ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0"),
    "eps a word": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5'"),
    "theta": ({"rope_theta": -1.0}, "rope_theta=-1.0"),
    "tied a word": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
    "more layers": ({"num_hidden_layers": 3}, r"model\.layers\.2\.input_layernorm\.weight is missing"),
    "untied without a head": (UNTIED, r"lm_head\.weight is missing"),
    "other width inside": ({"intermediate_size": 64}, r"mlp\.\w+_proj\.weight has the shape.*the model needs"),
    "other groups": (
        {"num_key_value_heads": 4},
        r"k_proj\.weight has the shape \[16, 32\].*needs \[32, 32\]",
    ),
}


@pytest.mark.parametrize(("changes", "words"), CONFIGS.values(), ids=CONFIGS)
def test_a_model_that_is_not_the_plain_architecture_is_refused(tmp_path, changes, words):
    write(tmp_path, CONFIG | changes, draw(CONFIG))
    with pytest.raises(UserError, match=words):
        load_llama(tmp_path)
