"""Small random RWKV-7 checkpoints on disk, with the names of Hugging Face and with those of the authors."""

import re

import llama_folders
import numpy as np

CONFIG = {
    "architectures": ["RWKV7ForCausalLM"],
    "model_type": "rwkv7",
    "hidden_size": 16,
    "attention_hidden_size": 16,
    "num_hidden_layers": 3,
    "num_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "decay_low_rank_dim": 3,
    "a_low_rank_dim": 4,
    "v_low_rank_dim": 2,
    "gate_low_rank_dim": 5,
    "norm_eps": 1e-5,
    "norm_bias": True,
    "vocab_size": 40,
    "tie_word_embeddings": False,
    "value_dim": [16, 16, 16],
    "attn_mode": "reference",
    "auto_map": {"AutoModel": "modeling_rwkv7.RWKV7Model"},
}
RANKS = {"w": "decay_low_rank_dim", "a": "a_low_rank_dim", "v": "v_low_rank_dim", "g": "gate_low_rank_dim"}


def shapes(config):
    """Name -> shape of every tensor."""
    width, heads, hidden = config["hidden_size"], config["num_heads"], config["intermediate_size"]
    found = {"model.embeddings.weight": (config["vocab_size"], width), "lm_head.weight": (config["vocab_size"], width)}
    norms = ["model.norm", "model.layers.0.pre_norm"]
    for place in (f"model.layers.{i}." for i in range(config["num_hidden_layers"])):
        norms += [f"{place}{name}" for name in ("attn_norm", "ffn_norm", "attn.g_norm")]
        found |= {f"{place}attn.x_{letter}": (1, 1, width) for letter in "rwkvag"}
        found |= {f"{place}attn.{letter}_proj.weight": (width, width) for letter in "rkvo"}
        found |= {f"{place}attn.k_k": (width,), f"{place}attn.k_a": (width,), f"{place}ffn.x_k": (width,)}
        found |= {f"{place}attn.r_k": (heads, width // heads)}
        found |= {f"{place}ffn.key.weight": (hidden, width), f"{place}ffn.value.weight": (width, hidden)}
        for letter in "wag" if place.endswith(".0.") else "wavg":
            lora, rank = f"{place}attn.{letter}_lora.lora.", config[RANKS[letter]]
            found |= {f"{lora}0.weight": (rank, width), f"{lora}2.weight": (width, rank)}
            found |= {} if letter == "g" else {f"{lora}2.bias": (width,)}
    return found | {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}


def draw(config, kind="F32"):
    """Random tensors. Keys and values are so small that the epsilon of the norm of a head's read counts."""
    tensors = llama_folders.draw(config, kind, shapes=shapes)
    for name in tensors:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            tensors[name] = tensors[name] * tensors[name].dtype.type(0.1)
    return tensors


def of_the_authors(tensors):
    """The same as the authors store it: their names, vectors [1, 1, D], low-rank matrices [in, out], more tensors."""
    parts = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", "ln_x": "g_norm"}
    places = {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm", "att": "attn", "ffn": "ffn"}
    ends = {"emb": "model.embeddings", "ln_out": "model.norm", "head": "lm_head"}
    theirs = {f"{new}.{part}": tensors.get(f"{old}.{part}") for new, old in ends.items() for part in ("weight", "bias")}
    for name, tensor in tensors.items():
        if not (found := re.fullmatch(r"model\.layers\.(\d+)\.(\w+)\.(.+)", name)):
            continue
        (place,) = (new for new, old in places.items() if old == found[2])
        rest, vector = found[3], tensor.ndim == 1 and found[2] in ("attn", "ffn") and "norm" not in name
        for new, old in parts.items():
            rest = rest.replace(old, new)
        if lora := re.fullmatch(r"(\w)_lora\.lora\.(.*)", rest):
            rest, tensor = lora[1] + {"0.weight": "1", "2.weight": "2", "2.bias": "0"}[lora[2]], tensor.T
        theirs[f"blocks.{found[1]}.{place}.{rest}"] = np.ascontiguousarray(tensor[None, None] if vector else tensor)
    theirs |= {f"blocks.0.att.v{i}": np.ones_like(theirs[f"blocks.1.att.v{i}"]) for i in range(3)}
    return {name: tensor for name, tensor in theirs.items() if tensor is not None}
