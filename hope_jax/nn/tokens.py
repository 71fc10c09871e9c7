"""A mesh along time: between the mixers a device has a part of the tokens, inside a mixer all tokens of some heads.

A memory reads its tokens in order, so devices that have later ones would have to wait; heads do not wait for each
other. So the input of a mixer is moved from devices that have its tokens to devices that have its heads, and its output
is moved back (as DeepSpeed-Ulysses does for attention, arXiv 2309.14509). All other layers look at each token alone.
The functions here place an array on the devices; without devices along ``sequence`` they do nothing.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from hope_jax.memory.mesh import SHARE_BATCH, SHARE_HEADS, SHARE_TOKENS, devices_along, dividing, of_context
from hope_jax.types import Array, Float, Stream

Names = tuple[str, ...]
AS_IT_IS = PartitionSpec.UNCONSTRAINED


def shared(x: Stream, sequences: NamedSharding | None) -> Stream:
    """``x`` with sequences and tokens on the devices that share them; JAX alone might spread the features.

    JAX places a batch that those devices cannot share evenly. Tokens that they cannot share are on each of them.
    """
    if sequences is None:
        return x
    pairs = zip((SHARE_BATCH, SHARE_TOKENS), x.shape, strict=False)
    parts = [dividing(sequences.mesh, names, size) for names, size in pairs]
    place = NamedSharding(sequences.mesh, PartitionSpec(*parts))
    return jax.lax.with_sharding_constraint(x, place) if parts[0] else x


def mesh_of(sequences: NamedSharding | None) -> AbstractContextManager[Any]:
    """A context in which layers find the mesh of the devices that share the sequences."""
    return nullcontext() if sequences is None else jax.sharding.use_abstract_mesh(sequences.mesh.abstract_mesh)


def by_token(x: Stream) -> Stream:
    """Each device has a part of the tokens."""
    return _placed(x, {1: SHARE_TOKENS})


def by_feature(x: Stream) -> Stream:
    """Each device has a part of the features of all tokens, for layers that see earlier tokens, such as convolutions.

    Where features are those of heads side by side, the parts are heads.
    """
    return _placed(x, {1: (), 2: SHARE_HEADS})


def by_head(x: Float[Array, "B H T K"]) -> Float[Array, "B H T K"]:
    """Each device has some of the heads with all tokens."""
    return _placed(x, {1: SHARE_HEADS, 2: ()})


def _placed(x: Array, axes: dict[int, Names]) -> Array:
    """``x`` with its ``axes`` along these of the mesh, (): not split; ``x`` as it is where they do not divide it."""
    mesh = of_context()
    if mesh is None or devices_along(mesh, SHARE_TOKENS) == 1:
        return x
    along: dict[int, Any] = {axis: dividing(mesh, names, x.shape[axis]) for axis, names in axes.items()}
    if any(axes[axis] and names is None for axis, names in along.items()):
        return x
    along[0] = dividing(mesh, SHARE_BATCH, x.shape[0]) or AS_IT_IS
    spec = PartitionSpec(*(along.get(axis, AS_IT_IS) for axis in range(x.ndim)))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
