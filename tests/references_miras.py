"""Deep linear attention, Miras, Oja and Omega in plain numpy, token by token, from their equations and nothing of ours.

As in ``references.py``, everything is right for complex inputs, and weights are a list of ``[out, in]`` matrices.
"""

import numpy as np
from references import gelu, gelu_slope, sig, sig_pullback

EPS = 1e-6


def layer_norm(z):
    c = z - np.mean(z)
    return c / np.sqrt(np.mean(c * c) + EPS)


def layer_norm_pullback(z, v):
    """J(z)^T v, with n = (z - mean) / s: (v - mean(v) - n mean(n v)) / s."""
    c = z - np.mean(z)
    s = np.sqrt(np.mean(c * c) + EPS)
    return (v - np.mean(v) - c * np.mean(c * v) / (s * s)) / s


def lp_error(e, p=3.0):
    """p sign(e) |e|^(p-1), both smoothed."""
    size = np.sqrt(e * e + EPS)
    return p * (e / size) * size ** (p - 1)


def huber_error(e, delta=1.0, beyond="direction"):
    norm = np.sqrt(np.sum(e * e))
    if norm.real <= delta:
        return e
    return delta * (np.sign(e.real) if beyond == "sign" else e / norm)


def norm_link(a, q=4):
    """A / norm_q(A)^(q-2), q even: no absolute values."""
    return a / (np.sum(a**q) ** (1 / q)) ** (q - 2)


def softmax_link(z):
    """c softmax(Z) along the inputs, c the root of their number."""
    grown = np.exp(z)
    return np.sqrt(z.shape[1]) * grown / np.sum(grown, axis=1, keepdims=True)


def same(x):
    return x


def miras(keys, values, queries, rate, retention, decay, weights, period, error=same, link=same, read="after"):
    """M(z) = z + LN(W1 gelu(W2 z)), W = link(A), A = alpha A - eta gradient at W of the period's start."""
    a, w, reads = list(weights), [link(x) for x in weights], []
    for t, (k, v, q) in enumerate(zip(keys, values, queries, strict=True)):
        if t % period == 0:
            w2, w1 = w
        before = w
        z = w2 @ k
        y = w1 @ gelu(z)
        up = layer_norm_pullback(y, error(k + layer_norm(y) - v))
        gradients = [np.outer(gelu_slope(z) * (w1.T @ up), k), np.outer(up, gelu(z))]
        a = [retention[t] * x - rate[t] * g for x, g in zip(a, gradients, strict=True)]
        w = [link(x) for x in a]
        seen = {"after": w, "before": before, "anchor": (w2, w1)}[read]
        reads.append(q + layer_norm(seen[1] @ gelu(seen[0] @ q)))
    return np.stack(reads), a


def memora_as_published(keys, values, queries, rate, retention, weights, period):
    """Reads of the multiplicative step itself: W = c softmax(alpha log W - eta gradient), W > 0 from the first."""
    w, reads = [softmax_link(x) for x in weights], []
    for t, (k, v, q) in enumerate(zip(keys, values, queries, strict=True)):
        if t % period == 0:
            w2, w1 = w
        z = w2 @ k
        y = w1 @ gelu(z)
        up = layer_norm_pullback(y, k + layer_norm(y) - v)
        gradients = [np.outer(gelu_slope(z) * (w1.T @ up), k), np.outer(up, gelu(z))]
        w = [softmax_link(retention[t] * np.log(x) - rate[t] * g) for x, g in zip(w, gradients, strict=True)]
        reads.append(q + layer_norm(w[1] @ gelu(w[0] @ q)))
    return np.stack(reads)


def dla(keys, values, queries, rate, retention, decay, weights, period):
    """M(z) = W1 sig(W2 z), one step up the slope of <M(k), v> at the period's start."""
    (w2, w1), reads = weights, []
    for t, (k, v, q) in enumerate(zip(keys, values, queries, strict=True)):
        if t % period == 0:
            a2, a1 = w2, w1
        w2 = retention[t] * w2 + rate[t] * np.outer(sig_pullback(a2 @ k, a1.T @ v), k)
        w1 = retention[t] * w1 + rate[t] * np.outer(v, sig(a2 @ k))
        reads.append(w1 @ sig(w2 @ q))
    return np.stack(reads), [w2, w1]


def oja(keys, values, queries, rate, retention, decay, weights, period):
    """M_t = alpha M + eta v (k - M^T v)^T; y = M q. The stored memory is M^T."""
    m, reads = np.zeros((values.shape[1], keys.shape[1])), []
    for t, (k, v, q) in enumerate(zip(keys, values, queries, strict=True)):
        m = retention[t] * m + rate[t] * np.outer(v, k - m.T @ v)
        reads.append(m @ q)
    return np.stack(reads), [m.T]


def omega(keys, values, queries, strength, retention, weights, period, read="after"):
    """M_t = alpha M - sum_i gamma_{t,i} gradient of pair t - i, M(z) = z + W1 sig(W2 z), gradients at the anchor."""
    (w2, w1), reads = weights, []
    for t, q in enumerate(queries):
        if t % period == 0:
            a2, a1 = w2, w1
        old = w2, w1
        w2, w1 = retention[t] * w2, retention[t] * w1
        for i, gamma in enumerate(strength[t]):
            if i > t:
                break
            k, v = keys[t - i], values[t - i]
            e = k + a1 @ sig(a2 @ k) - v
            w2 = w2 - gamma * np.outer(sig_pullback(a2 @ k, a1.T @ e), k)
            w1 = w1 - gamma * np.outer(e, sig(a2 @ k))
        seen = (w2, w1) if read == "after" else old
        reads.append(q + seen[1] @ sig(seen[0] @ q))
    return np.stack(reads), [w2, w1]


def omega_linear(keys, values, queries, strength, retention):
    """M_t = M_{t-1} (alpha I - sum_i gamma k_i k_i^T) + sum_i gamma v_i k_i^T."""
    m, reads = np.zeros((values.shape[1], keys.shape[1])), []
    for t, q in enumerate(queries):
        pairs = [(g, keys[t - i], values[t - i]) for i, g in enumerate(strength[t]) if i <= t]
        erase = sum(g * np.outer(k, k) for g, k, _ in pairs)
        m = m @ (retention[t] * np.eye(len(q)) - erase) + sum(g * np.outer(v, k) for g, k, v in pairs)
        reads.append(m @ q)
    return np.stack(reads)


def yaad(*inputs, period):
    return miras(*inputs, period, error=huber_error)


def moneta(*inputs, period):
    return miras(*inputs, period, error=lp_error, link=norm_link)


def memora(*inputs, period):
    return miras(*inputs, period, link=softmax_link)


ROWS = {"dla": dla, "yaad": yaad, "moneta": moneta, "memora": memora, "oja": oja}
