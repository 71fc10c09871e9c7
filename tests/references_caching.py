"""Memory caching (arXiv 2602.24281) in numpy, token by token: the gated residual memory (Eq. 9-10) and the soup.

From the equations and from nothing of ours; parameters are the layers' own, as nested dicts. Right for complex inputs
too, as ``references.derivative`` needs it.
"""

from dataclasses import dataclass

import numpy as np
from references import initial, sigmoid
from references_titans import Memory, project, recall, write


@dataclass
class Matrix:
    """M of one head, written by the delta rule."""

    m: np.ndarray

    @property
    def weights(self):
        return (self.m,)

    def write(self, k, v, rate):
        self.m = self.m + rate * np.outer(v - self.m @ k, k)


class Deep(Memory):
    """The memory of Titans."""

    @property
    def weights(self):
        return self.w2, self.w1


def answer(weights, q):
    """M(q), of a deep memory less the query."""
    return weights[0] @ q if len(weights) == 1 else recall(weights, q) - q


def started(p, heads, period):
    if "start_memory_0" not in p:
        size = p["project_q"]["kernel"].shape[1] // heads
        return [Matrix(np.zeros((size, size))) for _ in range(heads)]
    pairs = zip(initial(p, "memory", 0), initial(p, "memory", 1), strict=True)
    return [Deep(first.T, second.T, period) for first, second in pairs]


def written(p, memories, inputs, rate_max):
    """The newest of the inputs goes into the memories of all heads."""
    if "gate_retention" in p:
        return write(p, memories, inputs, rate_max)
    rates = rate_max * sigmoid(inputs[-1] @ p["gate_rate"]["kernel"] + p["gate_rate"]["bias"])
    pairs = (project(p, name, inputs, len(memories)) for name in "kv")
    for memory, k, v, rate in zip(memories, *pairs, rates, strict=True):
        memory.write(k, v, rate)
    return None


def shares_of(scores):
    weights = np.exp(scores - np.max(np.real(scores)))
    return weights / weights.sum()


def mixed(shares, versions, q, soup):
    """What the versions of one head's memory answer together: the mean of answers, or the answer of mean weights."""
    if soup:
        return answer(
            [sum(s * w for s, w in zip(shares, layer, strict=True)) for layer in zip(*versions, strict=True)], q
        )
    return sum(s * answer(weights, q) for s, weights in zip(shares, versions, strict=True))


def output(p, u, queries, answers):
    """Of a deep memory [s q * silu(W_g u), s' answers], of a matrix s RMSNorm(answers) * silu(W_g u)."""
    gate = u @ p["gate"]["kernel"]
    gate = gate * sigmoid(gate)
    if "scale" in p:
        normed = [a / np.sqrt(np.mean(a * a) + 1e-6) * s for a, s in zip(answers, p["scale"], strict=True)]
        return (np.concatenate(normed) * gate) @ p["down"]["kernel"]
    asked = np.concatenate([q * s for q, s in zip(queries, p["scale_query"], strict=True)]) * gate
    found = np.concatenate([a * s for a, s in zip(answers, p["scale_answer"], strict=True)])
    return np.concatenate([asked, found]) @ p["down"]["kernel"]


def caching(params, x, *, heads, segment, period, rate_max, anew, soup=False, leak=False):
    """Outputs of the layer, and the memories' weights and the mean input of every segment that has ended.

    ``anew``: segments start from the learned start. ``leak``: the present segment's mean is that of the whole segment.
    """
    p, ends, means, out = params["memory"], [], [], []
    memories = started(p, heads, period)
    for t, u in enumerate(x):
        begin = t // segment * segment
        if anew and t == begin:
            memories = started(p, heads, period)
        written(p, memories, x[: t + 1], rate_max)
        now = [memory.weights for memory in memories]
        mean = np.mean(x[begin : begin + segment if leak else t + 1], axis=0)
        scores = np.array([(u @ params["relevance"]["kernel"]) @ m for m in [*means, mean]]) / np.sqrt(len(u))
        shares, queries = shares_of(scores), project(p, "q", x[: t + 1], heads)
        versions = zip(*[*ends, now], strict=True)
        answers = [mixed(shares, of_head, q, soup) for of_head, q in zip(versions, queries, strict=True)]
        out.append(output(p["out"], u, queries, answers))
        if t + 1 == begin + segment:
            ends.append(now)
            means.append(mean)
    return np.stack(out), ends, means
