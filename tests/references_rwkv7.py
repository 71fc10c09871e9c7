"""RWKV-7 (arXiv 2503.14456) in plain numpy, token by token, and the recurrence below it; nothing of ours is imported.

The recurrence is also right for complex inputs, so that ``references.derivative`` can differentiate it. The epsilons of
the norms are those of the authors' code; checkpoints may have others.
"""

import numpy as np
from references_checkpoints import below


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def vector_delta(memory, keys, writes, queries, *, retention, looked_up=None, cleared=None, read="before"):
    """Reads and final memory of M <- M (diag(r) - b c^T) + w k^T; b are ``looked_up``, c ``cleared``, both [T,K]."""
    reads = []
    for t, (k, w, q, r) in enumerate(zip(keys, writes, queries, retention, strict=True)):
        before = memory
        memory = before @ np.diag(r) + np.outer(w, k)
        if looked_up is not None and cleared is not None:
            memory = memory - np.outer(before @ looked_up[t], cleared[t])
        reads.append((before if read == "before" else memory) @ q)
    return np.stack(reads), memory


def shifted(u):
    """The token before, 0 before the first one."""
    return np.concatenate([np.zeros((1, u.shape[1])), u[:-1]])


def low_rank(p, x, inner):
    return inner(x @ p["down"]["kernel"]) @ p["up"]["kernel"] + p.get("offset", 0)


def time_mix(p, u, heads, first=None, eps=64e-5):
    """Output [T,D], final memories [H,V,K] and first values [T,D] of the time mix for normed inputs [T,D].

    ``p`` are its parameters; ``first`` the values of the first layer, None in that layer, whose values are the first.
    """
    x = {n: u + (shifted(u) - u) * p[f"mix_{n}"] for n in ("receptance", "decay", "key", "value", "rate", "gate")}
    r, k, v = (x[n] @ p[n]["kernel"] for n in ("receptance", "key", "value"))
    w = np.exp(-np.exp(-0.5) * sigmoid(low_rank(p["decay"], x["decay"], np.tanh)))
    a = sigmoid(low_rank(p["rate"], x["rate"], lambda z: z))
    g = low_rank(p["gate"], x["gate"], sigmoid)
    if first is None:
        first = v
    else:
        v = v + (first - v) * sigmoid(low_rank(p["share"], x["value"], lambda z: z))
    kap, k = k * p["erase_scale"], k * (1 + (a - 1) * p["key_scale"])
    r, k, v, w, a, kap = (z.reshape(len(u), heads, -1) for z in (r, k, v, w, a, kap))
    kap = kap / np.maximum(np.linalg.norm(kap, axis=2, keepdims=True), 1e-12)
    y, ends = np.zeros_like(v), []
    for h in range(heads):
        m = np.zeros((v.shape[2], k.shape[2]))
        for t in range(len(u)):
            m = m @ (np.diag(w[t, h]) - np.outer(kap[t, h], a[t, h] * kap[t, h])) + np.outer(v[t, h], k[t, h])
            y[t, h] = m @ r[t, h]
        ends.append(m)
    y = (y - y.mean(axis=2, keepdims=True)) / np.sqrt(y.var(axis=2, keepdims=True) + eps)
    y = y.reshape(u.shape) * p["norm"]["scale"] + p["norm"]["bias"]
    y = y + (np.sum(r * k * p["bonus"], axis=2, keepdims=True) * v).reshape(u.shape)
    return (y * g) @ p["out"]["kernel"], np.stack(ends), first


def channel_mix(p, u):
    """Output [T,D] of the channel mix for normed inputs [T,D]."""
    hidden = (u + (shifted(u) - u) * p["mix"]) @ p["key"]["kernel"]
    return np.maximum(hidden, 0) ** 2 @ p["value"]["kernel"]


def layer_norm(p, x, eps):
    """Rows less their mean, by their standard deviation."""
    centred = x - x.mean(axis=1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps) * p["scale"] + p["bias"]


def model(p, tokens, heads, eps=1e-5, head_eps=64e-5):
    """Logits [T,vocab] of the whole model for the ids of one sequence.

    ``p``: embedding [vocab,D], head [D,vocab], the norms ``first_norm`` (of the embedding) and ``last_norm``, and
    ``layers``, each with time_norm, time, channel_norm and channel.
    """
    x, first = layer_norm(p["first_norm"], p["embedding"][tokens], eps), None
    for layer in p["layers"]:
        y, _, first = time_mix(layer["time"], layer_norm(layer["time_norm"], x, eps), heads, first, head_eps)
        x = x + y
        x = x + channel_mix(layer["channel"], layer_norm(layer["channel_norm"], x, eps))
    return layer_norm(p["last_norm"], x, eps) @ p["head"]


def gated_linear_attention(keys, values, queries, retention):
    """y_t = sum_{s <= t} v_s sum_d k_s[d] q_t[d] prod_{s < u <= t} r_u[d]: no state at all."""
    rows = []
    for t, q in enumerate(queries):
        left = [np.prod(retention[s + 1 : t + 1], axis=0) for s in range(t + 1)]
        rows.append(sum(values[s] * np.sum(keys[s] * left[s] * q) for s in range(t + 1)))
    return np.stack(rows)


def stored(tensors):
    """The parameters of ``model`` from tensors as checkpoints of Hugging Face name them; matrices are [out, in]."""
    tensors = below(tensors, "")

    def norm(place):
        return {"scale": tensors[f"{place}.weight"], "bias": tensors[f"{place}.bias"]}

    def layer(place):
        attn, ffn = below(tensors, f"{place}.attn."), below(tensors, f"{place}.ffn.")
        mixed = {"receptance": "r", "decay": "w", "key": "k", "value": "v", "rate": "a", "gate": "g"}
        time = {f"mix_{name}": attn[f"x_{letter}"].ravel() for name, letter in mixed.items()}
        for name, letter in {"receptance": "r", "key": "k", "value": "v", "out": "o"}.items():
            time[name] = {"kernel": attn[f"{letter}_proj.weight"].T}
        for name, letter in {"decay": "w", "rate": "a", "share": "v", "gate": "g"}.items():
            lora = f"{letter}_lora.lora."
            if f"{lora}0.weight" in attn:  # the first layer has no share
                down, up = ({"kernel": attn[f"{lora}{n}.weight"].T} for n in (0, 2))
                time[name] = {"down": down, "up": up, "offset": attn.get(f"{lora}2.bias", 0)}
        time |= {"erase_scale": attn["k_k"], "key_scale": attn["k_a"], "bonus": attn["r_k"]}
        time["norm"] = norm(f"{place}.attn.g_norm")
        maps = {name: {"kernel": ffn[f"{name}.weight"].T} for name in ("key", "value")}
        norms = {"time_norm": norm(f"{place}.attn_norm"), "channel_norm": norm(f"{place}.ffn_norm")}
        return norms | {"time": time, "channel": {"mix": ffn["x_k"].ravel(), **maps}}

    count = sum(name.endswith("ffn.x_k") for name in tensors)
    return {
        "embedding": tensors["model.embeddings.weight"],
        "first_norm": norm("model.layers.0.pre_norm"),
        "layers": [layer(f"model.layers.{i}") for i in range(count)],
        "last_norm": norm("model.norm"),
        "head": tensors["lm_head.weight"].T,
    }
