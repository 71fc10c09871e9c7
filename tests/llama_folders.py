"""Small random Llama checkpoints on disk."""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 24,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 20,
}
UNTIED = {"tie_word_embeddings": False}
TYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def shapes(config):
    """Name -> shape of every tensor."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    table = (config["vocab_size"], width)
    shared = width * config["num_key_value_heads"] // config["num_attention_heads"]
    layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (shared, width),
        "self_attn.v_proj": (shared, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    layers = range(config["num_hidden_layers"])
    found = {f"model.layers.{i}.{name}.weight": shape for i in layers for name, shape in layer.items()}
    found |= {"model.embed_tokens.weight": table, "model.norm.weight": (width,)}
    return found if config["tie_word_embeddings"] else found | {"lm_head.weight": table}


def draw(config, kind="F32", seed=0, shapes=shapes):
    """Random tensors of ``shapes(config)``.

    The embedding is so small that the first norms' eps counts as much as the mean square.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes(config).items():
        size = 2e-3 if "embed" in name else shape[-1] ** -0.5
        around = 1.0 if len(shape) == 1 else 0.0
        tensors[name] = (around + size * rng.standard_normal(shape)).astype(TYPES[kind])
    return tensors


def write(folder, config, tensors, shards=1):
    """A checkpoint; several shards share the tensors in turn and have an index."""
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = {i: f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)}
    places = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files.values():
        save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
