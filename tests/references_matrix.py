"""The mixers with matrix memories in numpy, token by token from the papers' equations, one sequence u [T,D].

They take the parameters of the layer by name and return its output [T,D] and the final memories [H,V,K].
"""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(0, x)


def rms(x, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def unit(x):
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def conv(x, kernel):
    """y_t = sum_i kernel_i x_(t - width + 1 + i), nothing before the first token."""
    y = np.zeros_like(x)
    for t in range(len(x)):
        for i, tap in enumerate(kernel):
            past = t - len(kernel) + 1 + i
            y[t] += tap * x[past] if past >= 0 else 0
    return y


def stream(p, u):
    """A projection, a convolution, the bias if there is one, SiLU."""
    return silu(conv(u @ p["project"]["kernel"], p["conv"]["kernel"]) + p["conv"].get("bias", 0))


def steps(p, u, limits=(0, np.inf)):
    """Mamba's step and decay, [T,H]."""
    step = np.clip(softplus(u @ p["map"]["kernel"] + p["step_bias"]), *limits)
    return step, np.exp(-np.exp(p["log_decay"]) * step)


def output(p, u, reads, activation, eps):
    """W_o(scale RMSNorm_head(reads) * activation(W_g u)), reads [T,H,V]."""
    normed = rms(reads, eps) * p.get("scale", 1)
    return (normed.reshape(len(u), -1) * activation(u @ p["gate"]["kernel"])) @ p["down"]["kernel"]


def gated_deltanet(p, u, config):
    """Gated DeltaNet, arXiv 2412.06464: M = M (alpha (I - beta k k^T)) + beta v k^T; Comba, arXiv 2506.02475."""
    comba, heads = config.form == "comba", config.heads
    value_heads = heads * config.values_per_key
    q, k = (unit(stream(p[name], u).reshape(len(u), heads, -1)) for name in ("query", "key"))
    v = stream(p["value"], u).reshape(len(u), value_heads, -1)
    beta, (_, alpha) = sigmoid(u @ p["rate"]["kernel"]), steps(p["decay"], u)
    memory = np.zeros((value_heads, v.shape[2], k.shape[2]))
    reads = np.zeros_like(v)
    for t in range(len(u)):
        for h in range(value_heads):
            g = h // config.values_per_key
            key, query = k[t, g], q[t, g]
            if comba:
                query = query - p["correction"][g] * key
                transition = alpha[t, h] * np.eye(len(key))
                transition -= sigmoid(p["erase_share"][g]) * beta[t, h] * np.outer(key, key)
            else:
                transition = alpha[t, h] * (np.eye(len(key)) - beta[t, h] * np.outer(key, key))
            memory[h] = memory[h] @ transition + beta[t, h] * np.outer(v[t, h], key)
            reads[t, h] = memory[h] @ query / np.sqrt(len(key))
    activation, eps = (sigmoid, 1e-5) if comba else (silu, 1e-6)
    return output(p["out"], u, reads, activation, eps), memory


def retnet(p, u, config):
    """Retention, arXiv 2307.08621, with complex numbers: the features 2i and 2i + 1 are one number."""
    heads = config.heads
    streams = (u @ p[name]["kernel"] for name in ("query", "key", "value"))
    q, k, v = (x.reshape(len(u), heads, -1) for x in streams)
    size = q.shape[2]
    theta = 10_000.0 ** -(np.arange(size // 2) / (size // 2 - 1))
    memory, reads = np.zeros((heads, v.shape[2], size // 2), complex), np.zeros_like(v)
    for t in range(len(u)):
        turn = np.exp(1j * t * theta)
        for h in range(heads):
            query, key = ((x[t, h, ::2] + 1j * x[t, h, 1::2]) * turn for x in (q, k))
            memory[h] = (1 - 2.0 ** (-5 - h)) * memory[h] + np.outer(v[t, h], key) / np.sqrt(size)
            reads[t, h] = (memory[h] @ query.conj()).real
    return output(p["out"], u, reads, silu, 1e-6), np.concatenate([memory.real, memory.imag], axis=-1)


def mamba2(p, u, config):
    """Mamba-2, arXiv 2405.21060."""
    features, shared = config.expand * u.shape[1], config.groups * config.state
    inputs = stream(p["inputs"], u)
    x = inputs[:, :features].reshape(len(u), -1, config.head_size)
    b, c = (
        inputs[:, start : start + shared].reshape(len(u), config.groups, -1) for start in (features, features + shared)
    )
    heads = x.shape[1]
    step, alpha = steps(p["decay"], u, config.step_limits)
    memory, y = np.zeros((heads, config.head_size, config.state)), np.zeros_like(x)
    for t in range(len(u)):
        for h in range(heads):
            g = h // (heads // config.groups)
            memory[h] = alpha[t, h] * memory[h] + np.outer(step[t, h] * x[t, h], b[t, g])
            y[t, h] = memory[h] @ c[t, g] + p["skip"][h] * x[t, h]
    gated = y.reshape(len(u), -1) * silu(u @ p["gate"]["kernel"])
    normed = rms(gated.reshape(len(u), config.groups, -1), 1e-5).reshape(len(u), -1)
    return (normed * p["scale"]) @ p["down"]["kernel"], memory
