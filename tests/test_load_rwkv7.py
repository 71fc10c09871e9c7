"""Checkpoints of RWKV-7 against the slow numpy model that reads the stored names, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_rwkv7 as reference
from checkpoint_logits import distance, read
from llama_folders import write
from rwkv7_folders import CONFIG, draw, of_the_authors

from hope_jax.errors import UserError
from hope_jax.interop import load
from hope_jax.nn.language_model import LanguageModel

TOKENS = np.random.default_rng(7).integers(0, CONFIG["vocab_size"], (2, 11))


def expected(tensors, eps=1e-5, head_eps=64e-5):
    """The reference's logits of TOKENS."""
    stored = reference.stored(tensors)
    return np.stack([reference.model(stored, row, CONFIG["num_heads"], eps, head_eps) for row in TOKENS])


@pytest.mark.parametrize(("eps", "kind", "shards"), [(1e-5, "BF16", 1), (1e-3, "F32", 2)])
def test_the_logits_are_those_of_a_slow_model_that_reads_the_stored_names(x64, tmp_path, eps, kind, shards):
    stored, head_eps = CONFIG | {"norm_eps": eps}, eps * CONFIG["head_dim"]
    tensors = draw(stored, kind)
    config, params = load(write(tmp_path, stored, tensors, shards), jnp.float64)
    theirs = expected(tensors, eps, head_eps)
    assert distance(read(config, params, TOKENS), theirs) < 1e-12
    shaped = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), TOKENS[:, :1])["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shaped)
    for other in (expected(tensors, eps, 2 * head_eps), expected(tensors, 2 * eps, head_eps)):
        assert distance(other, theirs) > 1e-7, "both epsilons must matter, or they are not tested"


def test_files_of_the_authors_need_no_configuration(x64, tmp_path):
    tensors = draw(CONFIG)
    write(tmp_path, CONFIG, of_the_authors(tensors))
    (tmp_path / "config.json").unlink()
    config, params = load(tmp_path, jnp.float64)
    assert distance(read(config, params, TOKENS), expected(tensors)) < 1e-12


@pytest.mark.parametrize(
    "stated",
    [{"num_heads": 32}, {"num_heads": None}, {"head_dim": None}, {"value_dim": 16}, {"value_dim": None}],
    ids=str,
)
def test_sizes_are_stated_in_several_ways(tmp_path, stated):
    """The number of heads is not read where there is a head_dim: public files have 32 where there are 12."""
    config, _ = load(write(tmp_path, CONFIG | stated, draw(CONFIG)))
    assert config.pattern[0][0].head_dim == 8  # pyright: ignore[reportAttributeAccessIssue]


OF_THE_AUTHORS = {
    "missing": ("blocks.1.att.x_r", None, r"layers.1.attn.x_r is missing \(1 in all\); the model needs it"),
    "shape": ("blocks.1.att.r_k", (4, 4), r"blocks.1.att.r_k has the shape \[4, 4\]; the model needs \[2, 8\]"),
    "no map": ("blocks.1.att.w1", (16,), r"blocks.1.att.w1 has the shape \[16\]; expected a matrix"),
    "rank": ("blocks.1.att.w1", (16, 4), r"blocks.0.att.w1 has 3 and blocks.1.att.w1 has 4"),
    "more": ("blocks.1.att.x_x", (16,), "The tensor blocks.1.att.x_x is left over"),
}


@pytest.mark.parametrize(("name", "shape", "words"), OF_THE_AUTHORS.values(), ids=OF_THE_AUTHORS)
def test_messages_have_the_names_in_the_file(tmp_path, name, shape, words):
    tensors = of_the_authors(draw(CONFIG)) | {name: None if shape is None else np.zeros(shape)}
    write(tmp_path, CONFIG, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=words):
        load(tmp_path)


W, G, V = (f"attn.{letter}_lora.lora." for letter in "wgv")
REFUSED = {
    "decay": ({f"model.layers.1.{W}0.weight": (4, 16)}, {}, r"w_lora.lora.0.weight has 3 and .*1.*0.weight has 4"),
    "gate, one side": ({f"model.layers.2.{G}2.weight": (16, 4)}, {}, r"g_lora.* has 5 and .*layers.2.*2.weight has 4"),
    "share": ({f"model.layers.2.{V}0.weight": (3, 16)}, {}, "v_lora.* has 2 and .*layers.2.* has 3; give all the same"),
    "stated": ({}, {"v_low_rank_dim": 16}, "v_low_rank_dim=16; the tensors have 2"),
    "no map": (
        {f"model.layers.1.{W}0.weight": (16,)},
        {},
        r"w_lora.lora.0.weight has the shape \[16\]; expected a mat",
    ),
    "heads": ({"model.layers.0.attn.r_k": (2, 4)}, {}, "2 heads of 4 features, but embeddings of 16"),
    "later heads": ({"model.layers.1.attn.r_k": (4, 4)}, {}, r"layers.1.attn.r_k has the shape \[4, 4\]"),
    "head_dim": ({}, {"head_dim": 4}, "head_dim=4; the tensors have 8"),
    "number of heads": ({}, {"num_heads": 4, "head_dim": None}, "num_heads=4; the tensors have 2"),
    "value": ({}, {"value_dim": 32}, "value_dim=32; the tensors have 16"),
    "values": ({}, {"value_dim": [16, 16, 32]}, r"value_dim=\[16, 16, 32\]; the tensors have \[16, 16, 16\]"),
    "no share": ({f"model.layers.1.{V}0.weight": None}, {}, "layers.1.attn.v_lora.lora.0.weight is missing"),
    "no mixture": ({"model.layers.1.attn.x_r": None}, {}, "layers.1.attn.x_r is missing"),
    "more": ({"model.layers.0.ffn.x_r": (16,)}, {}, "layers.0.ffn.x_r is left over"),
    "hybrid": ({}, {"attn": {"layers": [1]}}, "attn=.*; only None"),
    "no bias": ({}, {"norm_bias": False}, "norm_bias=False; only True"),
    "tied": ({}, {"tie_word_embeddings": True}, "tie_word_embeddings=True; only False"),
    "unknown": ({}, {"num_experts": 4}, "num_experts=4, which this reader does not know"),
}


@pytest.mark.parametrize(("shapes", "changes", "words"), REFUSED.values(), ids=REFUSED)
def test_what_contradicts_itself_or_is_another_model_is_refused(tmp_path, shapes, changes, words):
    tensors = draw(CONFIG) | {name: None if shape is None else np.zeros(shape) for name, shape in shapes.items()}
    write(tmp_path, CONFIG | changes, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(UserError, match=words):
        load(tmp_path)


def test_one_layer_is_refused(tmp_path):
    stored = CONFIG | {"num_hidden_layers": 1, "value_dim": [16]}
    with pytest.raises(UserError, match="one layer; expected two or more"):
        load(write(tmp_path, stored, draw(stored)))
