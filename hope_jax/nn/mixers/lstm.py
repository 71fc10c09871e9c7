"""The LSTM as a mixer: the classic recurrent network, which recognises formal languages that Transformers do not.

    i, f, g, o = W x_t + b + U h_{t-1} + b'
    c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g),    h_t = sigmoid(o) * tanh(c_t)

Cells, start values and the two bias vectors are those of the LSTM baseline of Irie et al. 2023 (arXiv 2310.16076, there
``torch.nn.LSTM``), whose layers feed one another directly. A deviation: here a layer stands in a block of this library,
``x + lstm(RMSNorm(x))``, so it has a norm before it and a residual around it.

The gates of a token depend on the token before it, so tokens are computed one after another (``token_scan.py``).
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.memory.mesh import on_each
from hope_jax.memory.products import by_rows
from hope_jax.nn.axes import Axes
from hope_jax.nn.layers import param_dtype
from hope_jax.nn.token_scan import scan_tokens
from hope_jax.types import Array, Count, Float, PRNGKeyArray, Stream


@dataclass(frozen=True)
class LSTMConfig:
    """An LSTM of as many cells as the model has features; there is nothing to choose."""

    def build(self, width: int, dtype: DTypeLike) -> "LSTM":
        """The mixer for a model of ``width`` features."""
        return LSTM(self, width, dtype)


class LSTMState(NamedTuple):
    """Outputs and cells of the last token, in at least float32."""

    hidden: Float[Array, "B D"]
    cell: Float[Array, "B D"]


class LSTM(nn.Module):
    """``(u[B,T,D], state) -> (y[B,T,D], state)``; see the module docstring.

    The two matrix products are in ``dtype``, gates and cells in at least float32.
    """

    config: LSTMConfig
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        def start(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
            bound = self.width**-0.5
            return jax.random.uniform(key, shape, param_dtype(self.dtype), -bound, bound)

        gates = 4 * self.width  # i, f, g, o side by side
        self.kernels = [self.param(f"kernel_{name}", start, (self.width, gates)) for name in ("input", "hidden")]
        self.biases = [self.param(f"bias_{name}", start, (gates,)) for name in ("input", "hidden")]

    @nn.nowrap
    def axes(self) -> Axes:
        kernels = {f"kernel_{name}": ("embed", "cell_gates") for name in ("input", "hidden")}
        return kernels | {f"bias_{name}": ("cell_gates",) for name in ("input", "hidden")}

    @nn.nowrap
    def init_state(self, batch: int, capacity: int) -> LSTMState:
        """Nothing read: zeros. ``capacity`` is for attention and unused here."""
        zeros = jnp.zeros((batch, self.width), param_dtype(self.dtype))
        return LSTMState(zeros, zeros)

    def __call__(self, u: Stream, state: LSTMState, count: Count = None) -> tuple[Stream, LSTMState]:
        of_input, of_hidden = (kernel.astype(self.dtype) for kernel in self.kernels)
        given = self._product(u, of_input) + (self.biases[0] + self.biases[1])[None, None]

        def run(of_hidden: Array, state: LSTMState, given: Array) -> tuple[LSTMState, Array]:
            return scan_tokens(functools.partial(self._step, of_hidden), state, given, count)

        state, y = on_each(run, (of_hidden,), (state, given), share=())
        return y.astype(self.dtype), state

    @nn.nowrap
    def _step(
        self, of_hidden: Float[Array, "D gates"], state: LSTMState, given: Float[Array, "B gates"]
    ) -> tuple[LSTMState, Float[Array, "B D"]]:
        """One token; ``given`` is ``W x_t + b + b'``."""
        i, f, g, o = jnp.split(given + self._product(state.hidden, of_hidden), 4, axis=-1)
        cell = nn.sigmoid(f) * state.cell + nn.sigmoid(i) * jnp.tanh(g)
        hidden = nn.sigmoid(o) * jnp.tanh(cell)
        return LSTMState(hidden, cell), hidden

    @nn.nowrap
    def _product(self, x: Float[Array, "*batch D"], kernel: Float[Array, "D gates"]) -> Float[Array, "*batch gates"]:
        """``x W``, factors in ``dtype`` and the sum in at least float32."""
        wide = param_dtype(self.dtype)
        return by_rows(lambda rows: jnp.dot(rows, kernel, preferred_element_type=wide), x.astype(self.dtype))
