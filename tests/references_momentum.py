"""The momentum optimizers in plain numpy, written from the equations for single matrices and from nothing of ours."""

import numpy as np

QUINTIC = (3.4445, -4.7750, 2.0315)


def newton_schulz(x, steps=5, method="quintic"):
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        if method == "cubic":
            x = 1.5 * x - 0.5 * square @ x
        else:
            a, b, c = QUINTIC
            x = a * x + b * square @ x + c * square @ square @ x
    return x


def m3_literal(start, gradients, rate, fast, slows, b2, eps=1e-8):
    """Algorithm 1 (SPEC 5.5): ``fast`` is (b, weight), ``slows`` are (period, b, weight); all parameters on the way."""
    theta, m1, v, path = start, 0 * start, 0 * start, []
    slow = [dict(m=0 * start, o=0 * start, block=[]) for _ in slows]
    for t, g in enumerate(gradients, 1):
        total = 0
        for (period, b, weight), s in zip(slows, slow, strict=True):
            if (t - 1) % period == 0:
                s["m"] = s["m"] + b * sum(s["block"], 0 * start)
                s["o"], s["block"] = newton_schulz(s["m"]), []
            s["block"].append(g)
            total = total + weight * s["o"]
        m1, v = m1 + fast[0] * g, v + b2 * g**2
        theta = theta - rate * (fast[1] * newton_schulz(m1) + total) / (np.sqrt(v) + eps)
        path.append(theta)
    return path


def rms(x):
    return np.sqrt(np.mean(x**2))


def m3_average(start, gradients, rate, fast, slows, b2, eps=1.0, decay=0.0):
    """The training default of SPEC 5.5, with its buffer kept apart."""
    theta, m1, v, path = start, 0 * start, 0 * start, []
    slow = [dict(m=0 * start, o=0 * start, block=[]) for _ in slows]
    for t, g in enumerate(gradients, 1):
        total = 0
        for (period, b, weight), s in zip(slows, slow, strict=True):
            if (t - 1) % period == 0 and t > 1:
                s["m"] = b * s["m"] + (1 - b) * np.mean(s["block"], axis=0)
                s["o"], s["block"] = newton_schulz(s["m"]), []
            s["block"].append(g)
            total = total + weight * s["o"]
        m1, v = fast[0] * m1 + (1 - fast[0]) * g, b2 * v + (1 - b2) * g**2
        root = np.sqrt(v / (1 - b2**t))
        u = (fast[1] * newton_schulz(m1 / (1 - fast[0] ** t)) + total) / (root / rms(root) + eps)
        theta = theta - rate * (0.2 * u / rms(u) + decay * theta)
        path.append(theta)
    return path


def delta_momentum(m, g, form, alpha, e):
    """One step for W [out, in] with P = I and eta = 1 (SPEC 5.2)."""
    size = np.sum(g**2)
    if form == "gram":
        return alpha * m - e / (1 + e * size) * (m @ g.T) @ g - g
    if form == "scalar":
        return max(0.0, alpha - e * size) * m - g
    return alpha * m - e * m @ g.T @ g - g


def learned_preconditioner(gradients, zeta, eps=1e-8):
    """Eq. 38-41, elementwise, keys sign(g), from the first |g| on: preconditioned gradients."""
    p, out = 0 * gradients[0], []
    for g in gradients:
        p = np.where(p == 0, np.abs(g), p - zeta * (p * np.sign(g) - g) * np.sign(g))
        out.append(g / (p + eps))
    return out
