"""Titans (arXiv 2501.00663) with attention in numpy: memory as gate, Eq. 26-28, and as context, Eq. 21-25.

Token by token, from the equations and from nothing of ours; parameters are the layers' own, as nested dicts. Right for
complex inputs too, as ``references.derivative`` needs it.
"""

from dataclasses import dataclass, field

import numpy as np
from references import initial, sig, sig_pullback, sigmoid, unit


@dataclass
class Memory:
    """M(x) = x + W1 sig(W2 x) of one head: gradients at the last multiple of ``period`` tokens, with momentum."""

    w2: np.ndarray
    w1: np.ndarray
    period: int
    surprise: tuple = (0, 0)
    anchor: tuple = field(default=())
    count: int = 0

    def read(self, q):
        return recall((self.w2, self.w1), q)

    def write(self, k, v, rate, retention, decay):
        if self.count % self.period == 0:
            self.anchor = self.w2, self.w1
        (a2, a1), (s2, s1) = self.anchor, self.surprise
        h = sig(a2 @ k)
        e = k + a1 @ h - v
        s2 = decay * s2 - rate * np.outer(sig_pullback(a2 @ k, a1.T @ e), k)
        s1 = decay * s1 - rate * np.outer(e, h)
        self.surprise, self.count = (s2, s1), self.count + 1
        self.w2, self.w1 = retention * self.w2 + s2, retention * self.w1 + s1


def recall(weights, q):
    return q + weights[1] @ sig(weights[0] @ q)


def memories(p, period):
    pairs = zip(initial(p, "memory", 0), initial(p, "memory", 1), strict=True)
    return [Memory(first.T, second.T, period) for first, second in pairs]


def project(p, name, inputs, heads):
    """Queries, keys or values of the newest of the inputs: map, convolution over the last ones, SiLU, unit heads."""
    taps = p[f"conv_{name}"]["kernel"]
    rows = [x @ p[f"project_{name}"]["kernel"] for x in inputs[-len(taps) :]]
    z = sum(tap * row for tap, row in zip(taps[-len(rows) :], rows, strict=True))
    return [unit(head) for head in (z * sigmoid(z)).reshape(heads, -1)]


def write(p, heads, inputs, rate_max):
    """The newest of the inputs goes into the memories of all heads."""

    def gate(name):
        return sigmoid(inputs[-1] @ p[f"gate_{name}"]["kernel"] + p[f"gate_{name}"]["bias"])

    pairs = (project(p, name, inputs, len(heads)) for name in "kv")
    gates = rate_max * gate("rate"), gate("retention"), gate("momentum")
    for memory, *given in zip(heads, *pairs, *gates, strict=True):
        memory.write(*given)


def read(p, heads, inputs):
    queries = project(p, "q", inputs, len(heads))
    return np.concatenate([memory.read(q) for memory, q in zip(heads, queries, strict=True)])


def rms(x, scale):
    return x / np.sqrt(np.mean(x * x) + 1e-6) * scale["scale"]


def turn(z, at):
    """Rotary positions; None turns nothing."""
    if at is None:
        return z
    half = len(z) // 2
    angles = at * 10_000.0 ** (-np.arange(half) / half)
    left, right = z[:half], z[half:]
    return np.concatenate(
        [left * np.cos(angles) - right * np.sin(angles), left * np.sin(angles) + right * np.cos(angles)]
    )


def attention(p, heads, u, at, seen):
    """u at position ``at`` looks at pairs of a vector and its position."""
    q = (u @ p["query"]["kernel"]).reshape(heads, -1)
    pairs = [[(z @ p[name]["kernel"]).reshape(heads, -1) for z, _ in seen] for name in ("key", "value")]
    out = []
    for h in range(heads):
        keys = np.stack([turn(k[h], place) for k, (_, place) in zip(pairs[0], seen, strict=True)])
        scores = keys @ turn(q[h], at) / np.sqrt(len(q[h]))
        weights = np.exp(scores - scores.real.max())
        out.append(weights / weights.sum() @ np.stack([v[h] for v in pairs[1]]))
    return np.concatenate(out)


def output(p, y, m):
    return (rms(y, p["norm_attention"]) * sigmoid(rms(m, p["norm_memory"]))) @ p["down"]["kernel"]


def mag(p, x, *, heads, window, period, rate_max):
    """Outputs, and the memories at the end."""
    vectors, inputs, out = list(p["persistent"]), [], []
    memory = memories(p["memory"], period)
    for z in vectors:
        inputs.append(z)
        write(p["memory"], memory, inputs, rate_max)
    for t, u in enumerate(x):
        inputs.append(u)
        write(p["memory"], memory, inputs, rate_max)
        seen = [(z, None) for z in vectors] + [(x[s], s) for s in range(max(0, t - window + 1), t + 1)]
        y = attention(p["attention"], heads, u, t, seen)
        out.append(output(p["out"], y, read(p["memory"], memory, inputs)))
    return np.stack(out), memory


def mac(p, x, *, heads, segment, period, rate_max, leak=None):
    """Outputs, and the memories at the end. ``leak``: "context" or "memory", one of the two steps as it is printed."""
    memory, ys, out = memories(p["memory"], period), [], []
    for start in range(0, len(x), segment):
        tokens = x[start : start + segment]
        frozen = [(m.w2, m.w1) for m in memory]
        h = []
        for j in range(len(tokens)):
            queries = project(p["memory"], "q", x[: start + j + 1], heads)
            recalled = [recall(w, q) for w, q in zip(frozen, queries, strict=True)]
            h.append(rms(np.concatenate(recalled), p["norm_recalled"]))
        for j, u in enumerate(tokens):
            last = len(tokens) if leak == "context" else j + 1
            seen = [(z, None) for z in p["persistent"]]
            seen += [(h[i], i) for i in range(last)] + [(tokens[i], i) for i in range(j + 1)]
            ys.append(attention(p["attention"], heads, u, j, seen))
        reads = []
        for end in range(start + 1, start + len(tokens) + 1):
            write(p["memory"], memory, ys[:end], rate_max)
            reads.append(read(p["memory"], memory, ys[:end]))
        if leak == "memory":
            reads = [read(p["memory"], memory, ys[:end]) for end in range(start + 1, start + len(tokens) + 1)]
        out += [output(p["out"], y, m) for y, m in zip(ys[start:], reads, strict=True)]
    return np.stack(out), memory
