"""The layers of a memory: a stack of linear maps, optionally residual (SPEC 1.3, 1.4; Eq. 89, 91).

``matrix`` is one linear layer, ``M(x) = W x``. ``residual_mlp`` is ``M(x) = x + W1 sig(W2 x)``; ``normed_mlp`` is
``M(x) = x + LayerNorm(W1 gelu(W2 x))`` (Miras, arXiv 2504.13173). Every layer of each is a linear memory of its own
with that layer's input as key. Weights are kernels as in Flax, a tuple of ``[in, out]`` matrices, first layer first:
the transposes of the W of the equations. On CPU ``x W^T`` is slower than ``x W`` (``hope-jax benchmark products``).
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
    """unit(GELU(z)): hidden features of norm 1, so that a single write has an effect (SPEC 2.4, 2.7)."""
    return unit(jax.nn.gelu(z))


def layer_norm(z: Float[Array, "*axes V"]) -> Float[Array, "*axes V"]:
    """(z - mean) / deviation over the last axis, without parameters, in at least float32."""

    def standard(rows: Array) -> Array:
        centred = rows - jnp.mean(rows, axis=-1, keepdims=True)  # first: the mean may be far larger than the deviation
        return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-6)

    return by_rows(standard, z.astype(jnp.promote_types(z.dtype, jnp.float32)))


Back = Callable[[Array], tuple[Array]]


class Pass(NamedTuple):
    """A forward pass of inputs through a memory: the inputs [T,F] of each layer after the first, and their derivatives.

    ``backs`` are the vector-Jacobian products of the activations in front of those layers, ``outputs`` each layer's
    weights applied to its input, [T,V]. ``answer`` is M(x) without the residual, and ``back`` the vector-Jacobian
    product from it to the last layer's output; None where they are the same.
    """

    inputs: list[Array]
    backs: list[Back]
    outputs: list[Array]
    answer: Array
    back: Back | None


@dataclass(frozen=True)
class Architecture:
    """A memory of ``layers`` linear maps, 1 or more, with an activation between them, applied to [..., F].

    ``residual`` adds the input to the output and needs equal key and value sizes. ``scales``, one for each layer: the
    standard deviation of its initial weights, times 1/sqrt(fan-in). ``output`` is a function of the last layer's
    output, before a residual is added, such as ``layer_norm``; None: there is none.
    """

    layers: int
    residual: bool
    scales: tuple[float, ...]
    activation: Activation = unit_gelu
    output: Activation | None = None

    def __post_init__(self) -> None:
        whole("layers", self.layers)
        if len(self.scales) != self.layers:
            raise UserError(f"scales has {len(self.scales)} numbers for {self.layers} layers; give one per layer")

    @property
    def keeps_query(self) -> bool:
        """Whether M(x) is x plus a small answer: a residual memory that does not norm its output."""
        return self.residual and self.output is None

    def init(self, key: PRNGKeyArray, key_dim: int, value_dim: int, hidden: int) -> Weights:
        """Initial weights of one head: layers [key_dim, hidden] ... [hidden, value_dim]."""
        if self.residual and key_dim != value_dim:
            raise UserError(f"a residual memory maps {key_dim} to {value_dim} features; make them equal")
        sizes = [key_dim] + [hidden] * (self.layers - 1) + [value_dim]
        keys = jax.random.split(key, self.layers)
        shapes = zip(keys, sizes[1:], sizes[:-1], self.scales, strict=True)
        # Drawn in the shape of the equations' W, so that a seed gives the same memory, however weights are stored.
        return tuple(scale * n**-0.5 * transpose(jax.random.normal(k, (m, n))) for k, m, n, scale in shapes)

    def forward(self, first: Float[Array, "T F"], later: Weights, products: Products = PLAIN) -> Pass:
        """The pass through fixed weights; ``first`` is the first layer's output, ``later`` are the layers after it."""
        inputs, backs, outputs = [], [], [first]
        for w in later:
            h, back = jax.vjp(self.activation, outputs[-1])
            inputs.append(h)
            backs.append(back)
            outputs.append(products.matmul(h, w))
        if self.output is None:
            return Pass(inputs, backs, outputs, outputs[-1], None)
        return Pass(inputs, backs, outputs, *jax.vjp(self.output, outputs[-1]))

    def apply(self, weights: Weights, x: Float[Array, "T K"], products: Products = PLAIN) -> Float[Array, "T V"]:
        """M(x) at fixed weights."""
        return self.finish(products.matmul(x, weights[0]), weights[1:], x, products)

    def finish(self, first: Float[Array, "T F"], later: Weights, x: Float[Array, "T K"], products: Products) -> Array:
        """M(x) from the output of the first layer."""
        for w in later:
            first = products.matmul(self.activation(first), w)
        return self.answer(first, x)

    def answer(self, last: Float[Array, "T V"], x: Float[Array, "T K"]) -> Float[Array, "T V"]:
        """M(x) from the output of the last layer."""
        last = last if self.output is None else self.output(last)
        return last + x if self.residual else last


matrix = Architecture(layers=1, residual=False, scales=(0.0,))
# A self-valued matrix cannot start at 0: its targets M(v), and with them every gradient, would be 0.
full_rank_matrix = Architecture(layers=1, residual=False, scales=(1.0,))
residual_mlp = Architecture(layers=2, residual=True, scales=(1.0, 0.1))
mlp = Architecture(layers=2, residual=False, scales=(1.0, 0.1))
# The norm removes the scale of the last layer, so it starts like the first.
normed_mlp = Architecture(2, residual=True, scales=(1.0, 1.0), activation=jax.nn.gelu, output=layer_norm)
# Projections start further from the identity: else key and value would be the plain inputs (SPEC 2.4).
projection_mlp = Architecture(layers=2, residual=True, scales=(1.0, 0.5))
