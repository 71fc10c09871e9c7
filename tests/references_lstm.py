"""LSTM and SRWM in plain numpy, token by token, written from their equations and from nothing of ours.

Right for complex inputs too, so that ``references.derivative`` differentiates them. Sequences are [T,D].
"""

import numpy as np


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z):
    e = np.exp(z)
    return e / np.sum(e)


def lstm(params, x, hidden, cell):
    """Outputs, and the hidden features and cells after the last token."""
    size, outputs = len(hidden), []
    for x_t in x:
        z = params["kernel_input"].T @ x_t + params["bias_input"]
        z = z + params["kernel_hidden"].T @ hidden + params["bias_hidden"]
        i, f, g, o = z[:size], z[size : 2 * size], z[2 * size : 3 * size], z[3 * size :]
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
        outputs.append(hidden)
    return np.stack(outputs), hidden, cell


def srwm_head(matrices, x):
    """Reads of one head, and its four matrices [out, in] after the last token: y, q, k, rates."""
    matrices, reads = list(matrices), []
    for x_t in x:
        y, q, k, b = (w @ x_t for w in matrices)
        q, k, eta = softmax(q), softmax(k), sigmoid(b)
        values = [(w @ q, w @ k) for w in matrices]  # what is wanted at k, and what is there
        matrices = [w + eta[i] * np.outer(a - b, k) for i, (w, (a, b)) in enumerate(zip(matrices, values, strict=True))]
        reads.append(y)
    return np.stack(reads), matrices


def srwm(params, x):
    """Outputs of the layer, and every head's matrices side by side as kernels, [H, in, columns]."""
    names, reads, ends = ("y", "q", "k", "rates"), [], []
    heads = len(params["start_y"])
    for h, own in enumerate(np.split(x, heads, axis=1)):
        read, end = srwm_head([params[f"start_{n}"][h].T for n in names], own)
        reads.append(read)
        ends.append(np.concatenate([w.T for w in end], axis=1))
    return np.concatenate(reads, axis=1) @ params["out"]["kernel"], np.stack(ends)
