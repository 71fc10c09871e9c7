"""Small random checkpoints of models with matrix memories: Mamba-2, Gated DeltaNet, and a layer of Qwen3-Next."""

import llama_folders

MAMBA2 = {
    "architectures": ["Mamba2ForCausalLM"],
    "model_type": "mamba2",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "head_dim": 8,
    "state_size": 6,
    "n_groups": 1,
    "expand": 2,
    "conv_kernel": 4,
    "vocab_size": 40,
    "layer_norm_epsilon": 1e-5,
    "time_step_limit": [0.0, float("inf")],
    "hidden_act": "silu",
    "use_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": True,
    "norm_before_gate": True,
    "chunk_size": 256,
}
GATED_DELTANET = {
    "architectures": ["GatedDeltaNetForCausalLM"],
    "model_type": "gated_deltanet",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "num_v_heads": None,
    "head_dim": 6,
    "expand_v": 1.5,
    "conv_size": 4,
    "hidden_ratio": 4,
    "intermediate_size": 24,
    "norm_eps": 1e-6,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "hidden_act": "swish",
    "use_gate": True,
    "use_short_conv": True,
    "allow_neg_eigval": False,
    "attn": None,
    "attn_mode": "chunk",
    "tie_word_embeddings": True,
}
QWEN3_NEXT = {
    "model_type": "qwen3_next",
    "hidden_size": 16,
    "num_hidden_layers": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-3,
    "hidden_act": "silu",
    "num_experts": 4,
}


def mamba2(config):
    """Name -> shape of every tensor."""
    width, heads, table = config["hidden_size"], config["num_heads"], (config["vocab_size"], config["hidden_size"])
    features = heads * config["head_dim"]
    inputs = features + 2 * config["n_groups"] * config["state_size"]
    layer = {
        "norm.weight": (width,),
        "mixer.in_proj.weight": (features + inputs + heads, width),
        "mixer.conv1d.weight": (inputs, 1, config["conv_kernel"]),
        "mixer.conv1d.bias": (inputs,),
        **dict.fromkeys(("mixer.dt_bias", "mixer.A_log", "mixer.D"), (heads,)),
        "mixer.norm.weight": (features,),
        "mixer.out_proj.weight": (width, features),
    }
    found = {f"backbone.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    found |= {"backbone.embeddings.weight": table, "backbone.norm_f.weight": (width,)}
    return found if config["tie_word_embeddings"] else found | {"lm_head.weight": table}


def gated_deltanet(config):
    """Name -> shape of every tensor."""
    width, hidden, table = (
        config["hidden_size"],
        config["intermediate_size"],
        (config["vocab_size"], config["hidden_size"]),
    )
    heads, size = config["num_v_heads"] or config["num_heads"], int(config["head_dim"] * config["expand_v"])
    widths = {"q": config["num_heads"] * config["head_dim"], "v": heads * size}
    widths["k"] = widths["q"]
    layer = {"attn_norm.weight": (width,), "mlp_norm.weight": (width,)}
    layer |= {f"attn.{x}_proj.weight": (out, width) for x, out in (widths | {"g": widths["v"]}).items()}
    layer |= {f"attn.{x}_conv1d.weight": (out, 1, config["conv_size"]) for x, out in widths.items()}
    layer |= {f"attn.{x}_proj.weight": (heads, width) for x in "ab"} | {
        "attn.dt_bias": (heads,),
        "attn.A_log": (heads,),
    }
    layer |= {"attn.o_norm.weight": (size,), "attn.o_proj.weight": (width, widths["v"])}
    layer |= {"mlp.gate_proj.weight": (hidden, width), "mlp.up_proj.weight": (hidden, width)}
    layer |= {"mlp.down_proj.weight": (width, hidden)}
    found = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    found |= {"model.embeddings.weight": table, "model.norm.weight": (width,)}
    return found if config["tie_word_embeddings"] else found | {"lm_head.weight": table}


def qwen3_next(config):
    """Name -> shape of the tensors of block 4's linear attention, and one of another block's."""
    width, key_heads, heads = config["hidden_size"], config["linear_num_key_heads"], config["linear_num_value_heads"]
    keys, values = key_heads * config["linear_key_head_dim"], heads * config["linear_value_head_dim"]
    layer = {
        "in_proj_qkvz.weight": (2 * keys + 2 * values, width),
        "in_proj_ba.weight": (2 * heads, width),
        "conv1d.weight": (2 * keys + values, 1, config["linear_conv_kernel_dim"]),
        "A_log": (heads,),
        "dt_bias": (heads,),
        "norm.weight": (config["linear_value_head_dim"],),
        "out_proj.weight": (width, values),
    }
    return {f"model.layers.4.linear_attn.{name}": shape for name, shape in layer.items()}


SHAPES = {"mamba2": mamba2, "gated_deltanet": gated_deltanet, "qwen3_next": qwen3_next}


def draw(config, kind="F32"):
    """Random tensors. Steps are small, so that memories last for some tokens."""
    tensors = llama_folders.draw(config, kind, shapes=SHAPES[config["model_type"]])
    for name, tensor in tensors.items():
        if name.endswith("dt_bias"):
            tensor -= 4
    return tensors
