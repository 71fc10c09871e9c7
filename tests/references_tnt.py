"""TNT (arXiv 2511.07343) in plain numpy, token by token: a memory set back at shards, a frozen one, projected queries.

Everything is of one head; P_t sums unit(k) unit(k)^T, which is k k^T / ||k||^2 but for unit's small number.
"""

import numpy as np
from references import self_modifying, sig, sig_pullback, titans, unit


def projected(keys, queries, shard):
    """unit(P_t q_t) with the keys of the shard up to and with t."""
    rows = []
    for t, (k, q) in enumerate(zip(keys, queries, strict=True)):
        span = np.outer(unit(k), unit(k)) + (0 if t % shard == 0 else span)
        rows.append(unit(span @ q))
    return np.stack(rows)


def local_titans(keys, values, queries, rate, retention, decay, weights, period, shard):
    """Reads of Titans' memory at the projected queries, from its start at every shard, and these queries."""
    asked, parts = projected(keys, queries, shard), []
    for start in range(0, len(keys), shard):
        given = (x[start : start + shard] for x in (keys, values, asked, rate, retention, decay))
        parts.append(titans(*given, weights, period)[0])
    return np.concatenate(parts), asked


def local_self_modifying(streams, starts, log_rates, biases, shard, **how):
    """The same of a head of self-modifying Titans: all its boxes start anew."""
    parts = []
    for start in range(0, len(streams["x"]), shard):
        given, size = {n: x[start : start + shard] for n, x in streams.items()}, streams["k"].shape[1]
        parts.append(self_modifying(given, starts, log_rates, biases, span=np.zeros((size, size)), **how))
    return tuple(np.concatenate(x) for x in zip(*((reads, asked) for reads, _, asked in parts), strict=True))


def frozen(keys, values, queries, rate, weights, period):
    """M(x) = x + W1 sig(W2 x), read and differentiated as it was at the start of the period; it only adds."""
    w2, w1 = weights
    reads = []
    for t, (k, v, q) in enumerate(zip(keys, values, queries, strict=True)):
        if t % period == 0:
            a2, a1 = w2, w1
        reads.append(q + a1 @ sig(a2 @ q))
        h = sig(a2 @ k)
        e = k + a1 @ h - v
        w2 = w2 - rate[t] * np.outer(sig_pullback(a2 @ k, a1.T @ e), k)
        w1 = w1 - rate[t] * np.outer(e, h)
    return np.stack(reads)
