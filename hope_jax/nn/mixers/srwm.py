"""The self-referential weight matrix: a matrix that computes its own keys, queries and rates, and rewrites itself.

Per head, with x_t the head's features of the input and W = [W_y; W_q; W_k; W_b] (rows d, d, d, 4):

    [y_t; q; k; b] = W_{t-1} x_t,    q = softmax(q),  k = softmax(k),  eta = sigmoid(b), one for each block of rows
    W_t = W_{t-1} + diag(eta) W_{t-1} (q - k) k^T

It is the delta rule of each block of rows: erase eta k k^T, write eta (W_{t-1} q) k^T. All of k, q and eta come from
W_{t-1}, so there is no form in chunks, and tokens are computed one after another (``token_scan.py``).
Source: Irie et al. 2022 (arXiv 2202.05780) in the form for formal languages (arXiv 2310.16076).

A deviation: there x is the residual stream itself and a layer is ``LayerNorm(x) + W_o y``. Here a block of this library
is ``x + W_o y``, and y is computed from ``RMSNorm(x)``: the input is normalised and the residual is not.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from hope_jax.errors import whole
from hope_jax.memory.mesh import on_each
from hope_jax.nn.axes import Axes, dense_axes
from hope_jax.nn.layers import TORCH, check_heads, dense, param_dtype
from hope_jax.nn.token_scan import scan_tokens
from hope_jax.types import Array, Count, Float, PRNGKeyArray, Stream

# Mean of the initial weights, and their standard deviation as a multiple of fan-in^-1/2.
STARTS = {"y": (0.0, 1.0), "q": (0.0, 0.01), "k": (0.0, 1.0), "rates": (-1.0, 1.0)}
RATES = 4  # one for each block of rows: y, q, k and the rates themselves


@dataclass(frozen=True)
class SRWMConfig:
    """A self-referential weight matrix for every head.

    heads: at least 1; must divide the model width.
    """

    heads: int

    def __post_init__(self) -> None:
        whole("heads", self.heads)

    def build(self, width: int, dtype: DTypeLike) -> "SRWM":
        """The mixer for a model of ``width`` features. Raises UserError if the heads do not divide it."""
        check_heads(self.heads, width)
        return SRWM(self, width, dtype)


class SRWMState(NamedTuple):
    """The matrices of every head as kernels, columns y, q, k and the four rates; in at least float32."""

    weights: Float[Array, "B H K columns"]


class SRWM(nn.Module):
    """``(u[B,T,D], state) -> (y[B,T,D], state)``; see the module docstring."""

    config: SRWMConfig
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        size = self.width // self.config.heads

        def start(key: PRNGKeyArray, columns: int, mean: float, scale: float) -> Float[Array, "H K columns"]:
            shape = (self.config.heads, size, columns)
            return mean + scale * size**-0.5 * jax.random.normal(key, shape, param_dtype(self.dtype))

        sizes = {name: RATES if name == "rates" else size for name in STARTS}
        self.initial = [self.param(f"start_{name}", start, sizes[name], *STARTS[name]) for name in STARTS]
        self.out = dense(self.width, self.dtype, start=TORCH)

    @nn.nowrap
    def axes(self) -> Axes:
        starts = {f"start_{name}": ("heads", "head_dim", "gate" if name == "rates" else "head_dim") for name in STARTS}
        return {**starts, "out": dense_axes("all_heads", "embed")}

    def init_state(self, batch: int, capacity: int) -> SRWMState:
        """Every matrix at its learned start. ``capacity`` is for attention and unused here."""
        weights = jnp.concatenate(self.initial, axis=-1)
        return SRWMState(jnp.broadcast_to(weights, (batch, *weights.shape)))

    def __call__(self, u: Stream, state: SRWMState, count: Count = None) -> tuple[Stream, SRWMState]:
        x = u.reshape(*u.shape[:2], self.config.heads, -1).astype(param_dtype(self.dtype))

        def run(weights: Array, x: Float[Array, "B H T K"]) -> tuple[Array, Array]:
            weights, y = scan_tokens(_step, weights, jnp.swapaxes(x, 1, 2), count)
            return weights, jnp.swapaxes(y, 1, 2)

        weights, y = on_each(run, (), (state.weights, jnp.swapaxes(x, 1, 2)))
        y = jnp.swapaxes(y, 1, 2)
        return self.out(y.reshape(u.shape).astype(self.dtype)), SRWMState(weights)


def _step(
    weights: Float[Array, "B H K columns"], x: Float[Array, "B H K"]
) -> tuple[Float[Array, "B H K columns"], Float[Array, "B H K"]]:
    """One token: read, then rewrite."""
    size = x.shape[-1]
    y, q, k, rates = jnp.split(_apply(weights, x), (size, 2 * size, 3 * size), axis=-1)
    q, k, rates = nn.softmax(q), nn.softmax(k), nn.sigmoid(rates)
    blocks = zip(jnp.split(rates, RATES, axis=-1), (y, q, k, rates), strict=True)
    rates = jnp.concatenate([jnp.broadcast_to(rate, block.shape) for rate, block in blocks], axis=-1)
    change = rates * _apply(weights, q - k)
    return weights + k[..., None] * change[..., None, :], y


def _apply(weights: Float[Array, "B H K columns"], x: Float[Array, "B H K"]) -> Float[Array, "B H columns"]:
    return jnp.einsum("bhk,bhkc->bhc", x, weights, precision=lax.Precision.HIGHEST)
