"""The linear memories of one segment, written together: their triangular systems are inverted in the same products.

A memory of several boxes has its layers stacked, ``[N, in, out]``. Every layer of every box is one linear memory with
keys, writes and an erase of its own; all of them live with the same retention and momentum decay.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.levels import kept
from hope_jax.memory.block import Coefficients, Written, advance, erase_matrix
from hope_jax.memory.triangular import unit_lower_inverse
from hope_jax.types import Array, Float


class Layer(NamedTuple):
    """One linear memory, or those of N boxes, with what is written into it.

    Attributes:
      memory, momentum, base: as in ``block.advance``.
      keys, alike, writes, erase: what the segment writes, as in ``block.advance``; no erase: None.
      held: ``memory`` applied to the keys, if that is known.
      shared: whether all boxes have the same keys and erase, and so one inverse.
    """

    memory: Float[Array, "*N K V"]
    momentum: Float[Array, "*N K V"] | None
    base: Float[Array, "*N K V"] | None
    keys: Float[Array, "*N C K"]
    alike: Float[Array, "*N C C"]
    writes: Float[Array, "*N C V"]
    erase: Float[Array, "*N C"] | None
    held: Float[Array, "*N C V"] | None
    shared: bool


def advance_all(layers: list[Layer], terms: Coefficients) -> list[Written]:
    """Write all layers; their triangular systems are inverted together, in one sequence of products."""
    written, one = [], functools.partial(advance, terms)
    for layer, inverse in zip(layers, _inverses(layers, terms), strict=True):
        advance_each = jax.vmap(one) if layer.memory.ndim == 3 else one
        fields = {name: value for name, value in layer._asdict().items() if name != "shared"}
        written.append(advance_each(**fields, inverse=inverse))
    return written


def _inverses(layers: list[Layer], terms: Coefficients) -> list[Array | None]:
    """(I + L diag(a))^-1 of every layer, as constants: ``solve_unit_lower`` has the derivatives. None without erase.

    They are kept for the backward pass: a twentieth more memory at 16 tokens, a tenth at 64.
    """
    lowers = [_erase_matrices(layer, terms) for layer in layers]
    systems = [lower for lower in lowers if lower is not None]
    if not systems:
        return lowers
    cuts = np.cumsum([len(lower) for lower in systems])[:-1]
    found = iter(jnp.split(kept(unit_lower_inverse(jnp.concatenate(systems))), cuts))
    return [None if layer.erase is None else _of_boxes(layer, next(found)) for layer in layers]


def _erase_matrices(layer: Layer, terms: Coefficients) -> Float[Array, "S C C"] | None:
    """Of every box, or of the first one where they share it; None without erase."""
    if layer.erase is None:
        return None
    alike, erase = jax.lax.stop_gradient((layer.alike, layer.erase))
    if layer.memory.ndim < 3:
        alike, erase = alike[None], erase[None]
    elif layer.shared:
        alike, erase = alike[:1], erase[:1]
    return jax.vmap(functools.partial(erase_matrix, jax.lax.stop_gradient(terms)))(alike, erase)


def _of_boxes(layer: Layer, inverses: Float[Array, "S C C"]) -> Float[Array, "*N C C"]:
    """Every box's inverse."""
    if layer.memory.ndim < 3:
        return inverses[0]
    return jnp.broadcast_to(inverses, (len(layer.memory), *inverses.shape[1:]))
