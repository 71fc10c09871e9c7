"""Llama, token by token and head by head in float64 numpy, on the tensors as a checkpoint names and shapes them."""

import numpy as np


def llama(tensors, config, tokens):
    """Logits [T, vocab] of one sequence; ``tensors`` by name, ``config`` as in ``config.json``."""
    weights = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    eps = config["rms_norm_eps"]
    stream = weights["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        here = f"model.layers.{i}."
        layer = {name.removeprefix(here): tensor for name, tensor in weights.items() if name.startswith(here)}
        stream = stream + attention(layer, config, rms_norm(stream, layer["input_layernorm.weight"], eps))
        stream = stream + mlp(layer, rms_norm(stream, layer["post_attention_layernorm.weight"], eps))
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return rms_norm(stream, weights["model.norm.weight"], eps) @ weights[head].T


def rms_norm(x, scale, eps):
    """Rows by their root mean square, eps inside the root."""
    return scale * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def mlp(layer, x):
    """down(silu(gate x) * up x)."""
    gate = x @ layer["mlp.gate_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * (x @ layer["mlp.up_proj.weight"].T)) @ layer["mlp.down_proj.weight"].T


def attention(layer, config, x):
    """Query head h looks at the key and value head h // (heads per key and value head)."""
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    q, k, v = (x @ layer[f"self_attn.{name}_proj.weight"].T for name in "qkv")
    size = q.shape[-1] // heads
    speeds = rotary_speeds(size, config["rope_theta"], config.get("rope_scaling"))
    out = np.zeros_like(q)
    for h in range(heads):
        source = h // (heads // shared)
        mine, theirs = (slice(at * size, (at + 1) * size) for at in (h, source))
        for t in range(len(x)):
            query = turned(q[t, mine], t, speeds)
            scores = np.array([query @ turned(k[s, theirs], s, speeds) for s in range(t + 1)])
            chances = np.exp(scores / np.sqrt(size) - np.max(scores / np.sqrt(size)))
            out[t, mine] = chances / chances.sum() @ v[: t + 1, theirs]
    return out @ layer["self_attn.o_proj.weight"].T


def turned(x, position, speeds):
    """x cos + rotate_half(x) sin, where rotate_half([a, b]) = [-b, a] and both halves have the same angles."""
    half = len(x) // 2
    angles = np.concatenate([position * speeds, position * speeds])
    return x * np.cos(angles) + np.concatenate([-x[half:], x[:half]]) * np.sin(angles)


def rotary_speeds(size, theta, scaling=None):
    """Feature by feature: by its wave length, as Llama 3.1 defines it, or all alike (linear)."""
    speeds = 1.0 / theta ** (np.arange(0, size, 2) / size)
    if not scaling or scaling["rope_type"] == "default":
        return speeds
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return speeds / factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    old, out = scaling["original_max_position_embeddings"], []
    for speed in speeds:
        wave_length = 2 * np.pi / speed
        if wave_length < old / high:
            out.append(speed)
        elif wave_length > old / low:
            out.append(speed / factor)
        else:
            smooth = (old / wave_length - low) / (high - low)
            out.append((1 - smooth) * speed / factor + smooth * speed)
    return np.array(out)
