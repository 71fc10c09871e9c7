"""Mamba-2 and Gated DeltaNet in float64 numpy, token by token, on the tensors as a checkpoint names and shapes them.

``inner``: epsilon of the norms inside of the layers, where it is not that of the blocks' norms.
"""

import numpy as np
from references_llama import mlp, rms_norm
from references_matrix import conv, rms, sigmoid, silu, softplus, unit


def below(tensors, place):
    """The tensors whose names begin with ``place``, without it, in float64."""
    return {n.removeprefix(place): np.asarray(t, np.float64) for n, t in tensors.items() if n.startswith(place)}


def convolved(p, name, x):
    """A depthwise convolution [C,1,taps] over time with its bias, if there is one, and SiLU."""
    return silu(conv(x, p[f"{name}.weight"][:, 0].T) + p.get(f"{name}.bias", 0))


def logits(tensors, config, stream, embedding, eps, norm):
    """The last norm, then the head or what it is tied to."""
    head = embedding if config["tie_word_embeddings"] else np.asarray(tensors["lm_head.weight"], np.float64)
    return rms_norm(stream, np.asarray(tensors[norm], np.float64), eps) @ head.T


def mamba2(tensors, config, tokens, inner=None):
    """Logits [T, vocab] of one sequence."""
    eps = config["layer_norm_epsilon"]
    embedding = np.asarray(tensors["backbone.embeddings.weight"], np.float64)
    stream = embedding[tokens]
    for i in range(config["num_hidden_layers"]):
        layer = below(tensors, f"backbone.layers.{i}.")
        u = rms_norm(stream, layer["norm.weight"], eps)
        stream = stream + mamba2_mixer(below(layer, "mixer."), config, u, inner or eps)
    return logits(tensors, config, stream, embedding, eps, "backbone.norm_f.weight")


def mamba2_mixer(p, config, u, eps):
    """[T,D] -> [T,D]: one map, one convolution, then every head for itself."""
    heads, size, state = config["num_heads"], config["head_dim"], config["state_size"]
    features, shared = heads * size, config["n_groups"] * state
    z, convolved_part, step = np.split(u @ p["in_proj.weight"].T, [features, 2 * features + 2 * shared], axis=1)
    x, b, c = np.split(convolved(p, "conv1d", convolved_part), [features, features + shared], axis=1)
    step = np.clip(softplus(step + p["dt_bias"]), *config["time_step_limit"])
    y = np.zeros_like(x)
    for h in range(heads):
        mine, group = slice(h * size, (h + 1) * size), h // (heads // config["n_groups"])
        theirs, memory = slice(group * state, (group + 1) * state), np.zeros((size, state))
        for t in range(len(u)):
            memory = np.exp(-np.exp(p["A_log"][h]) * step[t, h]) * memory + step[t, h] * np.outer(
                x[t, mine], b[t, theirs]
            )
            y[t, mine] = memory @ c[t, theirs] + p["D"][h] * x[t, mine]
    groups = (y * silu(z)).reshape(len(u), config["n_groups"], -1)
    return (rms(groups, eps).reshape(len(u), -1) * p["norm.weight"]) @ p["out_proj.weight"].T


def gated_deltanet(tensors, config, tokens, inner=None):
    """Logits [T, vocab] of one sequence."""
    eps, embedding = config["norm_eps"], np.asarray(tensors["model.embeddings.weight"], np.float64)
    stream = embedding[tokens]
    for i in range(config["num_hidden_layers"]):
        layer = below(tensors, f"model.layers.{i}.")
        p, u = below(layer, "attn."), rms_norm(stream, layer["attn_norm.weight"], eps)
        q, k, v = (convolved(p, f"{x}_conv1d", u @ p[f"{x}_proj.weight"].T) for x in "qkv")
        a, b, z = (u @ p[f"{x}_proj.weight"].T for x in "abg")
        y = delta_rule(p, q, k, v, a, b, config["num_heads"])
        stream = stream + gated(p["o_norm.weight"], y, z, inner or eps) @ p["o_proj.weight"].T
        stream = stream + mlp(layer, rms_norm(stream, layer["mlp_norm.weight"], eps))
    return logits(tensors, config, stream, embedding, eps, "model.norm.weight")


def qwen3_next_layer(p, config, u):
    """[T,D] -> [T,D] of the tensors below ``linear_attn.``; rows are split by key head, then joined by kind."""
    heads, size = config["linear_num_key_heads"], config["linear_key_head_dim"]
    ratio = config["linear_num_value_heads"] // heads
    kinds = {"q": [], "k": [], "v": [], "z": [], "b": [], "a": []}
    for matrix, names in (("in_proj_qkvz", "qkvz"), ("in_proj_ba", "ba")):
        value = ratio * config["linear_value_head_dim"] if matrix == "in_proj_qkvz" else ratio
        sizes = {"q": size, "k": size, "v": value, "z": value, "b": value, "a": value}
        for rows in np.split(p[f"{matrix}.weight"], heads):
            for name, part in zip(names, np.split(rows, np.cumsum([sizes[n] for n in names])[:-1]), strict=True):
                kinds[name].append(u @ part.T)
    q, k, v, z, b, a = (np.concatenate(parts, axis=1) for parts in kinds.values())
    joined = convolved(p, "conv1d", np.concatenate([q, k, v], axis=1))
    q, k, v = np.split(joined, [q.shape[1], 2 * q.shape[1]], axis=1)
    y = delta_rule(p, q, k, v, a, b, heads)
    return gated(p["norm.weight"], y, z, config["rms_norm_eps"]) @ p["out_proj.weight"].T


def delta_rule(p, q, k, v, a, b, key_heads):
    """Decay the memory, correct it by what it holds under the key, read it: [T, value heads, features]."""
    heads = b.shape[1]
    q, k = (unit(x.reshape(len(x), key_heads, -1)) for x in (q, k))
    v = v.reshape(len(v), heads, -1)
    alpha, y = np.exp(-np.exp(p["A_log"]) * softplus(a + p["dt_bias"])), np.zeros_like(v)
    for h in range(heads):
        memory, group = np.zeros((v.shape[2], k.shape[2])), h // (heads // key_heads)
        for t in range(len(v)):
            memory = alpha[t, h] * memory
            memory += sigmoid(b[t, h]) * np.outer(v[t, h] - memory @ k[t, group], k[t, group])
            y[t, h] = memory @ q[t, group] / np.sqrt(k.shape[2])
    return y


def gated(scale, y, z, eps):
    """The norm of every head, then the gate."""
    return (rms(y, eps) * scale).reshape(z.shape) * silu(z)
