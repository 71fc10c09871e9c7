"""The recurrences of the papers in plain numpy, token by token, written from the equations and from nothing of ours.

Everything is also right for complex inputs (nothing is conjugated, no absolute values), so ``derivative`` gives exact
directional derivatives of any of them by a complex step: values and gradients of the library are held against both.
Weights of a memory are a list of ``[out, in]`` matrices, first layer first.
"""

from dataclasses import dataclass, field

import numpy as np


def derivative(function, point, direction, step=1e-25):
    """d/ds function(point + s direction) at 0, exact to rounding; point and direction are dicts of arrays or lists."""
    moved = {name: _moved(x, direction.get(name), step) for name, x in point.items()}
    return np.imag(function(**moved)) / step


def _moved(x, d, step):
    if d is None:
        return x
    if isinstance(x, list | tuple):
        return [_moved(a, b, step) for a, b in zip(x, d, strict=True)]
    return x + 1j * step * np.asarray(d)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def unit(z):
    return z / np.sqrt(np.sum(z * z) + 1e-6)


GELU = np.sqrt(2 / np.pi)


def initial(params, name, layer):
    """Initial weights of memories called ``name``: a tenth of their parameters."""
    return 0.1 * params[f"start_{name}_{layer}"]


def gelu(z):
    return 0.5 * z * (1 + np.tanh(GELU * (z + 0.044715 * z**3)))


def gelu_slope(z):
    t = np.tanh(GELU * (z + 0.044715 * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * GELU * (1 + 3 * 0.044715 * z**2)


def sig(z):
    """Hidden activation of every MLP memory: unit(GELU(z))."""
    return unit(gelu(z))


def sig_pullback(z, v):
    """J_sig(z)^T v."""
    g = gelu(z)
    norm = np.sqrt(np.sum(g * g) + 1e-6)
    u = g / norm
    return gelu_slope(z) * (v - u * np.sum(u * v)) / norm


# ---------------------------------------------------------------- the recurrence (SPEC 1.1)


def gated_delta(memory, keys, writes, queries, *, retention, erase=None, momentum=None, momentum_decay=None,
                base=None, active=None, read="before"):  # fmt: skip
    """Reads, final memory, final momentum. With ``base`` B, the memory that is read and erased is B + M."""
    fixed = 0 * memory if base is None else base
    reads = []
    for t, (k, w, q) in enumerate(zip(keys, writes, queries, strict=True)):
        seen = fixed + memory
        if active is None or active[t]:
            surprise = np.outer(w, k)
            if momentum is not None:
                surprise = momentum = np.asarray(momentum_decay)[t] * momentum + surprise
            erased = 0 if erase is None else erase[t] * np.outer(seen @ k, k)
            memory = retention[t] * memory - erased + surprise
        reads.append((seen if read == "before" else fixed + memory) @ q)
    return np.stack(reads), memory, momentum


# ---------------------------------------------------------------- the literature's matrix memories


def linear_attention(keys, values, queries):
    """y_t = sum_{s <= t} v_s (k_s . q_t): no state at all."""
    rows = [sum(values[s] * (keys[s] @ q) for s in range(t + 1)) for t, q in enumerate(queries)]
    return np.stack(rows), [values.T @ keys]


def deltanet(keys, values, queries, rate):
    """M += eta (v - M k) k^T, then read."""
    m, reads = np.zeros((values.shape[1], keys.shape[1])), []
    for k, v, q, eta in zip(keys, values, queries, rate, strict=True):
        m = m + eta * np.outer(v - m @ k, k)
        reads.append(m @ q)
    return np.stack(reads), [m]


def gated_deltanet(keys, values, queries, rate, retention):
    """Forget first, then the delta rule on what is left."""
    m, reads = np.zeros((values.shape[1], keys.shape[1])), []
    for k, v, q, eta, alpha in zip(keys, values, queries, rate, retention, strict=True):
        m = alpha * m
        m = m + eta * np.outer(v - m @ k, k)
        reads.append(m @ q)
    return np.stack(reads), [m]


def titans_linear(keys, values, queries, rate, retention, decay, weights, period):
    """S = beta S - theta (M_anchor k - v) k^T; M = alpha M + S; the anchor moves every ``period`` tokens."""
    (m,), surprise, reads = weights, 0 * weights[0], []
    for t, (k, v, q) in enumerate(zip(keys, values, queries, strict=True)):
        anchor = m if t % period == 0 else anchor
        surprise = decay[t] * surprise - rate[t] * np.outer(anchor @ k - v, k)
        m = retention[t] * m + surprise
        reads.append(m @ q)
    return np.stack(reads), [m]


def titans(keys, values, queries, rate, retention, decay, weights, period):
    """The same for M(x) = x + W1 sig(W2 x), with the two gradients written out."""
    w2, w1 = weights
    s2, s1, reads = 0 * w2, 0 * w1, []
    for t, (k, v, q) in enumerate(zip(keys, values, queries, strict=True)):
        if t % period == 0:
            a2, a1 = w2, w1
        h = sig(a2 @ k)
        e = k + a1 @ h - v
        s2 = decay[t] * s2 - rate[t] * np.outer(sig_pullback(a2 @ k, a1.T @ e), k)
        s1 = decay[t] * s1 - rate[t] * np.outer(e, h)
        w2, w1 = retention[t] * w2 + s2, retention[t] * w1 + s1
        reads.append(q + w1 @ sig(w2 @ q))
    return np.stack(reads), [w2, w1]


# ---------------------------------------------------------------- Hope (SPEC 1.3, 1.4, 2)


@dataclass
class Box:
    """One memory that writes itself: anchor, running and momentum weights, and how it is written."""

    initial: list
    residual: bool
    period: int = 16
    objective: str = "l2"
    dgd_scope: str = "per_layer"
    rate_form: str = "exact"
    damped: bool = True
    retain_to: str = "zero"
    anchor: list = field(init=False)
    running: list = field(init=False)
    momentum: list = field(init=False)

    def __post_init__(self):
        self.running = [w + 0 for w in self.initial]
        self.anchor, self.momentum = self.running, [0 * w for w in self.initial]

    def refresh(self, t):
        if t % self.period == 0:
            self.anchor = self.running

    def apply(self, weights, x):
        h = x
        for w in weights[:-1]:
            h = sig(w @ h)
        return weights[-1] @ h + (x if self.residual else 0)

    def write(self, k, v, eta, alpha, beta=None):
        """One delta gradient descent step with retention, every layer with its own input (Eq. 88, 90; SPEC 1.4)."""
        target, a = self.apply(self.anchor, v), self.anchor
        inputs = [k] if len(a) == 1 else [k, sig(a[0] @ k)]
        error = -target if self.objective == "dot" else self.apply(a, k) - target
        deltas = [error] if len(a) == 1 else [sig_pullback(a[0] @ k, a[1].T @ error), error]
        running = []
        for i, (m, z, delta) in enumerate(zip(self.running, inputs, deltas, strict=True)):
            erases = self.dgd_scope == "per_layer" or (self.dgd_scope == "input_only" and i == 0)
            rate = eta / (1 + eta * (z @ z)) if erases and self.rate_form == "exact" else eta
            step = -rate * np.outer(delta, z)
            if beta is not None:
                step = self.momentum[i] = beta * self.momentum[i] + (1 - beta if self.damped else 1) * step
            pulled = (1 - alpha) * self.initial[i] if self.retain_to == "init" else 0
            running.append(alpha * m + pulled - (rate if erases else 0) * np.outer(m @ z, z) + step)
        self.running = running


def hope(keys, values, queries, rate, retention, decay, weights, period, objective="l2", residual=None, **how):
    """Hope's main memory with given gates: targets M_anchor(v), DGD per layer, damped momentum, read before write."""
    box = Box(list(weights), len(weights) > 1 if residual is None else residual, period, objective, **how)
    reads = []
    for t, (k, v, q) in enumerate(zip(keys, values, queries, strict=True)):
        box.refresh(t)
        reads.append(box.apply(box.running, q))
        box.write(k, v, rate[t], retention[t], decay[t])
    return np.stack(reads), box.running


def self_modifying(
    streams, starts, log_rates, biases, *, names, c_memory, c_projections, read, rate_max, retention, span=None, **how
):
    """One head of self-modifying Titans (SPEC 2.1): all boxes of ``names``, eta, alpha and memory, token by token.

    ``streams`` has x, k, v, q [T,d] and decay [T] or None; ``starts`` has per box a list of matrices;
    ``log_rates`` per group (memory, projections, gates); ``biases`` of the rate and the retention. A main memory of
    one matrix is not residual. ``span``, zeros [d,d]: queries are projected with the sum of the keys' k k^T.
    Returns reads [T,d], the boxes by name and the queries [T,d].
    """
    boxes = {n: Box(starts[n], True, c_projections, **how) for n in names}
    boxes |= {n: Box(starts[n], False, c_projections, **how) for n in ("eta", "alpha")}
    boxes["memory"] = Box(starts["memory"], len(starts["memory"]) > 1, c_memory, **how)
    scale = dict.fromkeys(names, np.exp(log_rates[1])) | dict.fromkeys(("eta", "alpha"), np.exp(log_rates[2]))
    scale["memory"] = np.exp(log_rates[0])
    reads, queries = [], []
    for t in range(len(streams["x"])):
        now = {n: streams[n][t] for n in "xkvq"}
        for box in boxes.values():
            box.refresh(t)
        for n in names:
            now[n] = unit(boxes[n].apply(boxes[n].anchor, now[n]))
        if span is not None:
            span = span + np.outer(unit(now["k"]), unit(now["k"]))
            now["q"] = unit(span @ now["q"])
        raw = {n: boxes[n].apply(boxes[n].anchor, now["x"])[0] for n in ("eta", "alpha")}
        eta = rate_max * sigmoid(raw["eta"] + biases[0])
        alpha = sigmoid(raw["alpha"] + biases[1]) if retention else 1.0
        main = boxes["memory"]
        seen = main.anchor if read == "anchor" else main.running
        for n, box in boxes.items():
            box.write(
                now["k"], now["v"], scale[n] * eta, alpha, None if streams["decay"] is None else streams["decay"][t]
            )
        reads.append(main.apply(main.running if read == "after" else seen, now["q"]))
        queries.append(now["q"])
    return np.stack(reads), boxes, np.stack(queries)
