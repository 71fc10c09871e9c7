"""What a memory is made of: a stack of linear layers, optionally residual (SPEC 1.3, 1.4; Eq. 89, 91).

``matrix`` is one linear layer, ``M(x) = W x``. ``residual_mlp`` is ``M(x) = x + W1 sig(W2 x)``. Every layer of
either is a linear memory of its own with that layer's input as key. Weights are kernels as in Flax, a tuple of
``[in, out]`` matrices, first layer first: the transposes of the W of the equations. On CPU ``x W^T`` is slower than
``x W`` (``hope-jax benchmark products``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hope_jax.errors import UserError, whole
from hope_jax.memory.kernels import PLAIN, Products
from hope_jax.memory.products import by_rows, transpose
from hope_jax.types import Array, Float, PRNGKeyArray

Weights = tuple[Float[Array, "..."], ...]
Activation = Callable[[Array], Array]


def unit(z: Float[Array, "*axes K"]) -> Float[Array, "*axes K"]:
    """z / ||z|| over the last axis, smooth at 0 (SPEC 0), in at least float32."""
    return by_rows(
        lambda rows: rows * jax.lax.rsqrt(jnp.sum(jnp.square(rows), axis=-1, keepdims=True) + 1e-6),
        z.astype(jnp.promote_types(z.dtype, jnp.float32)),
    )


def unit_gelu(z: Float[Array, "*axes F"]) -> Float[Array, "*axes F"]:
    """unit(GELU(z)): hidden features of norm 1, so that one write counts (SPEC 2.4, 2.7)."""
    return unit(jax.nn.gelu(z))


class Pass(NamedTuple):
    """The way of inputs through a memory: the inputs [T,F] of each layer after the first, and how they come about.

    ``backs`` are the vector-Jacobian products of the activations in front of those layers, ``outputs`` each layer's
    weights applied to its input, [T,V]; the last is M(x), less a residual.
    """

    inputs: list[Array]
    backs: list[Callable[[Array], tuple[Array]]]
    outputs: list[Array]


@dataclass(frozen=True)
class Architecture:
    """A memory of ``layers`` linear maps, 1 or more, with an activation between them, applied to [..., F].

    ``residual`` adds the input to the output and needs equal key and value sizes. ``scales``, one for each layer: the
    standard deviation of its initial weights, times 1/sqrt(fan-in).
    """

    layers: int
    residual: bool
    scales: tuple[float, ...]
    activation: Activation = unit_gelu

    def __post_init__(self) -> None:
        whole("layers", self.layers)
        if len(self.scales) != self.layers:
            raise UserError(f"scales has {len(self.scales)} numbers for {self.layers} layers; give one per layer")

    def init(self, key: PRNGKeyArray, key_dim: int, value_dim: int, hidden: int) -> Weights:
        """Initial weights of one head: layers [key_dim, hidden] ... [hidden, value_dim]."""
        if self.residual and key_dim != value_dim:
            raise UserError(f"a residual memory maps {key_dim} to {value_dim} features; make them equal")
        sizes = [key_dim] + [hidden] * (self.layers - 1) + [value_dim]
        keys = jax.random.split(key, self.layers)
        shapes = zip(keys, sizes[1:], sizes[:-1], self.scales, strict=True)
        # Drawn as the equations' W: a seed gives the same memory, however its weights are stored.
        return tuple(scale * n**-0.5 * transpose(jax.random.normal(k, (m, n))) for k, m, n, scale in shapes)

    def forward(self, first: Float[Array, "T F"], later: Weights, products: Products = PLAIN) -> Pass:
        """The way through fixed weights; ``first`` is the first layer's output, ``later`` are the layers after it."""
        inputs, backs, outputs = [], [], [first]
        for w in later:
            h, back = jax.vjp(self.activation, outputs[-1])
            inputs.append(h)
            backs.append(back)
            outputs.append(products.matmul(h, w))
        return Pass(inputs, backs, outputs)

    def apply(self, weights: Weights, x: Float[Array, "T K"], products: Products = PLAIN) -> Float[Array, "T V"]:
        """M(x) at fixed weights."""
        return self.finish(products.matmul(x, weights[0]), weights[1:], x, products)

    def finish(self, first: Float[Array, "T F"], later: Weights, x: Float[Array, "T K"], products: Products) -> Array:
        """M(x) from the output of the first layer."""
        for w in later:
            first = products.matmul(self.activation(first), w)
        return first + x if self.residual else first


matrix = Architecture(layers=1, residual=False, scales=(0.0,))
# A self-valued matrix cannot start at 0: its targets M(v), and with them every gradient, would be 0.
full_rank_matrix = Architecture(layers=1, residual=False, scales=(1.0,))
residual_mlp = Architecture(layers=2, residual=True, scales=(1.0, 0.1))
mlp = Architecture(layers=2, residual=False, scales=(1.0, 0.1))
# Projections start further from the identity, or key and value would be the plain inputs (SPEC 2.4).
projection_mlp = Architecture(layers=2, residual=True, scales=(1.0, 0.5))
