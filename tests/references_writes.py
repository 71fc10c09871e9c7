"""Levels written in context, in plain numpy: two levels of a linear model (SPEC 3.1; Eq. 71, 72)."""

import numpy as np
from references_momentum import newton_schulz


class Direction:
    """The step of an inner optimizer for the mean gradient of a finished period."""

    def __init__(self, optimizer):
        self._optimizer, self._first, self._second, self._count = optimizer, np.zeros((5, 5)), np.zeros((5, 5)), 0

    def __call__(self, g):
        if self._optimizer == "adam":
            self._count += 1
            self._first, self._second = 0.9 * self._first + 0.1 * g, 0.99 * self._second + 0.01 * g**2
            first, second = self._first / (1 - 0.9**self._count), self._second / (1 - 0.99**self._count)
            return first / (np.sqrt(second + 1e-16) + 1e-8)
        self._first = 0.9 * self._first + g
        return {"sgd": g, "momentum": self._first, "muon": 0.2 * 5**0.5 * newton_schulz(self._first)}[self._optimizer]


def by_hand(p, tokens, eta, nested, ended=False, optimizer="sgd"):
    """Losses and Delta of one sequence, one chunk of 3 tokens after another."""
    deltas, gathered, losses = [np.zeros((5, 5)) for _ in range(2)], [np.zeros((5, 5)) for _ in range(2)], []
    directions = [Direction(optimizer), Direction(optimizer)]
    for start in range(0, len(tokens) - (1 if ended else 3), 3):
        slopes = [np.zeros((5, 5)), np.zeros((5, 5))]
        for x, y in zip(tokens[start : start + 3], tokens[start + 1 : start + 4], strict=False):
            first, second = p["W"][0] + deltas[0], p["W"][1] + deltas[1]
            h = p["E"][x] @ first
            z = np.exp(h @ second - np.max(h @ second))
            error = z / z.sum() - np.eye(5)[y]
            losses.append(-np.log(z[y] / z.sum()))
            slopes[1] += np.outer(h, error) / 3
            slopes[0] += np.outer(p["E"][x], error @ second.T) / 3
        for i, period in enumerate((3, 6)):
            gathered[i] = gathered[i] + slopes[i]
            if (start + 3) % period == 0 or (ended and start + 3 >= len(tokens)):
                deltas[i] = deltas[i] - eta[i] * directions[i](gathered[i] * 3 / period)
                gathered[i] = np.zeros((5, 5))
        if nested and (start + 3) % 6 == 0 and not ended:
            deltas[0], directions[0] = np.zeros((5, 5)), Direction(optimizer)
    return np.array(losses), deltas
