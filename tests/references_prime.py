"""The Transformer of TTT-E2E (arXiv 2512.23675) before any write, in numpy: a block is

    x + attention over a window of norm(x), then x + SwiGLU_1(norm(x)), then x + SwiGLU_2(norm(x))

From the equations and from nothing of ours; parameters are the model's own, as nested dicts.
"""

import numpy as np
from references import sigmoid
from references_titans import attention, rms


def of_layer(tree, layer):
    return {name: of_layer(leaf, layer) if isinstance(leaf, dict) else leaf[layer] for name, leaf in tree.items()}


def swiglu(p, x):
    u = rms(x, p["norm"])
    gate = u @ p["gate"]["kernel"]
    return x + (gate * sigmoid(gate) * (u @ p["up"]["kernel"])) @ p["down"]["kernel"]


def block(p, x, heads, window):
    u, out = [rms(z, p["norm"]) for z in x], []
    for t, z in enumerate(x):
        seen = [(u[s], s) for s in range(max(0, t - window + 1), t + 1)]
        z = z + attention(p["mixer"], heads, u[t], t, seen) @ p["mixer"]["out"]["kernel"]
        out.append(swiglu(p["feed_forward"]["second"], swiglu(p["feed_forward"]["prime"], z)))
    return out


def nats(params, tokens, *, layers, heads, window):
    """The loss of every token but the first."""
    table = params["embedding"]
    x = list(table[tokens[:-1]] * np.sqrt(table.shape[1]))
    for layer in range(layers):
        x = block(of_layer(params["blocks"], layer), x, heads, window)
    logits = [10 * table @ rms(z, params["norm"]) for z in x]
    return np.array([np.log(np.exp(z).sum()) - z[label] for z, label in zip(logits, tokens[1:], strict=True)])
