"""TTT-Linear and TTT-MLP in plain numpy, token by token, from the equations of the paper (arXiv 2407.04620).

Every token has its own explicit weights. Rotary positions turn adjacent pairs of features, as the published ones do.
Weights of an inner model are a list of layers (W [in, out], b [out]). Right for complex inputs too, see
``references.derivative``.
"""

import numpy as np
from references import gelu, gelu_slope, sigmoid


def standard(x):
    """(x - mean) / deviation over the last axis, and the deviation."""
    centred = x - np.mean(x, axis=-1, keepdims=True)
    deviation = np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + 1e-6)
    return centred / deviation, deviation


def layer_norm(x, scale, bias):
    return standard(x)[0] * scale + bias


def inner_map(weights, x):
    """Z(x), and the input of every layer."""
    inputs = []
    for i, (w, b) in enumerate(weights):
        inputs.append(x)
        z = x @ w + b
        x = gelu(z) if i < len(weights) - 1 else z
    return x, inputs


def inner_loss(weights, norm, k, v):
    """1/2 ||f(k) - v||^2 with f(x) = x + LN(Z(x))."""
    return 0.5 * np.sum((k + layer_norm(inner_map(weights, k)[0], *norm) - v) ** 2)


def inner_gradient(weights, norm, k, v):
    """The gradient of ``inner_loss`` by the weights of every layer."""
    z, inputs = inner_map(weights, k)
    x, deviation = standard(z)
    e = (norm[0] * x + norm[1] - (v - k)) * norm[0]
    error, found = (e - np.mean(e) - x * np.mean(e * x)) / deviation, []
    for i in reversed(range(len(weights))):
        found.insert(0, (np.outer(inputs[i], error), error))
        if i:
            before = inputs[i - 1] @ weights[i - 1][0] + weights[i - 1][1]
            error = (weights[i][0] @ error) * gelu_slope(before)
    return found


def rotated(x, place):
    """Adjacent pairs of features turned by place * 10000^(-2i/K)."""
    angles = place * 10_000.0 ** (-np.arange(0, len(x), 2) / len(x))
    left, right = x[0::2], x[1::2]
    turned = np.zeros_like(x)
    turned[0::2] = left * np.cos(angles) - right * np.sin(angles)
    turned[1::2] = left * np.sin(angles) + right * np.cos(angles)
    return turned


def head(q, k, v, rate, shift, start, norm, period):
    """Reads [T,K] of one head, and its weights after every token."""
    reads, current = [], start
    for t in range(len(q)):
        place = t % period
        if place == 0:
            anchor, total = current, [(0 * w, 0 * b) for w, b in start]
        key, query = rotated(k[t], place), rotated(q[t], place)
        gradient = inner_gradient(anchor, norm, key, v[t])
        total = [(w + rate[t] * dw, b + rate[t] * db) for (w, b), (dw, db) in zip(total, gradient, strict=True)]
        gain = 1 / (place + 1) + shift[place]
        gain = gain if np.real(gain) > 0 else 0.0
        current = [(w - gain * dw, b - gain * db) for (w, b), (dw, db) in zip(anchor, total, strict=True)]
        reads.append(query + layer_norm(inner_map(current, query)[0], *norm))
    return np.stack(reads)


def convolved(x, conv):
    """y_t = b + sum_i kernel_i x_(t - width + 1 + i), nothing before the first token."""
    kernel = conv["kernel"]
    padded = np.concatenate([np.zeros((len(kernel) - 1, x.shape[1])), x])
    return conv["bias"] + sum(kernel[i] * padded[i : i + len(x)] for i in range(len(kernel)))


def layer(params, u, heads, period, rate_max):
    """The whole layer, [T,d] -> [T,d]."""
    size = u.shape[1] // heads
    qk, v = u @ params["project_qk"]["kernel"], u @ params["project_v"]["kernel"]
    q, k = convolved(qk, params["conv_q"]), convolved(qk, params["conv_k"])
    rate = rate_max * sigmoid(u @ params["rate"]["kernel"] + params["rate"]["bias"]) / size
    layers, reads = sum(name.startswith("start_weights") for name in params), []
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        start = [(params[f"start_weights_{i}"][h], params[f"start_bias_{i}"][h]) for i in range(layers)]
        norm = params["inner_scale"][h], params["inner_bias"][h]
        reads.append(head(q[:, own], k[:, own], v[:, own], rate[:, h], params["gain"], start, norm, period))
    normed = layer_norm(np.concatenate(reads, axis=1), params["norm"]["scale"], params["norm"]["bias"])
    return (gelu(u @ params["gate"]["kernel"]) * normed) @ params["out"]["kernel"]
