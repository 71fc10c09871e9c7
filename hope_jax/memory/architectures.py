"""What a memory is made of: a stack of linear layers, optionally residual (SPEC 1.3, 1.4; Eq. 89, 91).

``matrix`` is one linear layer, ``M(x) = W x``. ``residual_mlp`` is ``M(x) = x + W1 sig(W2 x)``. Every layer of
either is one call of ``recurrence.gated_delta`` with that layer's own input as key; ``rule.py`` does that.
Weights are kernels as in Flax, a tuple of ``[in, out]`` matrices, first layer first, for one head: the transposes of
the W of the equations. On CPU ``x W^T`` is slower than ``x W`` (``benchmark.py products``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hope_jax.errors import UserError
from hope_jax.memory.products import by_rows, flip, nn
from hope_jax.types import Array, Float, PRNGKeyArray

Weights = tuple[Float[Array, "..."], ...]
Activation = Callable[[Array], Array]


def unit(z: Float[Array, "*axes K"]) -> Float[Array, "*axes K"]:
    """z / ||z|| over the last axis, smooth at 0 (SPEC 0), in at least float32."""
    z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
    return by_rows(lambda rows: rows * jax.lax.rsqrt(jnp.sum(jnp.square(rows), axis=-1, keepdims=True) + 1e-6), z)


def unit_gelu(z: Float[Array, "*axes F"]) -> Float[Array, "*axes F"]:
    """unit(GELU(z)): hidden features of norm 1, so that one write counts (SPEC 2.4, 2.7)."""
    return unit(jax.nn.gelu(z))


class Pass(NamedTuple):
    """What happens on the way through a memory, layer by layer.

    Attributes:
      inputs: of each layer, [T,K].
      backs: vector-Jacobian products of the activations, one between any two layers.
      products: each layer's weights applied to its input, [T,V].
      output: M(x), [T,V].
    """

    inputs: list[Array]
    backs: list[Callable[[Array], tuple[Array]]]
    products: list[Array]
    output: Array


@dataclass(frozen=True)
class Architecture:
    """A memory of ``layers`` linear maps.

    Attributes:
      layers: number of linear layers, 1 or more.
      residual: add the input to the output; needs equal key and value sizes.
      activation: between layers, applied to [..., F].
      scales: standard deviation of each layer's initial weights, times 1/sqrt(fan-in). One number per layer.
    """

    layers: int
    residual: bool
    scales: tuple[float, ...]
    activation: Activation = unit_gelu

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise UserError(f"a memory has {self.layers} layers; expected at least 1")
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
        return tuple(scale * n**-0.5 * flip(jax.random.normal(k, (m, n))) for k, m, n, scale in shapes)

    def forward(self, weights: Weights, x: Float[Array, "T K"]) -> Pass:
        """The way of ``x`` through the memory at fixed weights."""
        inputs, backs, products = [x], [], [nn(x, weights[0])]
        for w in weights[1:]:
            h, back = jax.vjp(self.activation, products[-1])
            inputs.append(h)
            backs.append(back)
            products.append(nn(h, w))
        return Pass(inputs, backs, products, products[-1] + x if self.residual else products[-1])

    def apply(self, weights: Weights, x: Float[Array, "T K"]) -> Float[Array, "T V"]:
        """M(x) at fixed weights."""
        return self.forward(weights, x).output


matrix = Architecture(layers=1, residual=False, scales=(0.0,))
# A self-valued matrix cannot start at 0: its targets M(v), and with them every gradient, would be 0.
full_rank_matrix = Architecture(layers=1, residual=False, scales=(1.0,))
residual_mlp = Architecture(layers=2, residual=True, scales=(1.0, 0.1))
mlp = Architecture(layers=2, residual=False, scales=(1.0, 0.1))
# Projections start further from the identity, or key and value would be the plain inputs (SPEC 2.4).
projection_mlp = Architecture(layers=2, residual=True, scales=(1.0, 0.5))
