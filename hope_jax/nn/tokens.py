"""A mesh along time: between the mixers a device has a part of the tokens, inside a mixer all tokens of some heads.

A memory reads its tokens in order, so devices that have later ones would have to wait; heads do not wait for each
other. So what goes into a mixer is moved from tokens to heads, and what comes out of it from heads to tokens: each
device hands over what it has of the others' part (as DeepSpeed-Ulysses does for attention, arXiv 2309.14509). All else
looks at each token alone. The functions here say how an array lies; without devices along ``sequence`` they do nothing.
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
    """``x`` with sequences and tokens on the devices that share them; left to choose, JAX may spread the features.

    A batch that those devices cannot share evenly is left to it. Tokens that they cannot share each of them has.
    """
    if sequences is None:
        return x
    pairs = zip((SHARE_BATCH, SHARE_TOKENS), x.shape, strict=False)
    parts = [dividing(sequences.mesh, names, size) for names, size in pairs]
    place = NamedSharding(sequences.mesh, PartitionSpec(*parts))
    return jax.lax.with_sharding_constraint(x, place) if parts[0] else x


def mesh_of(sequences: NamedSharding | None) -> AbstractContextManager[Any]:
    """The mesh of the devices that share the sequences as that of the context, where layers find it."""
    return nullcontext() if sequences is None else jax.sharding.use_abstract_mesh(sequences.mesh.abstract_mesh)


def by_token(x: Stream) -> Stream:
    """Each device has a part of the tokens."""
    return _placed(x, {1: SHARE_TOKENS})


def by_feature(x: Stream) -> Stream:
    """Each device has a part of the features, of all tokens: for what looks at the tokens before, such as convolutions.

    Where features are those of heads side by side, the parts are heads.
    """
    return _placed(x, {1: (), 2: SHARE_HEADS})


def by_head(x: Float[Array, "B H T K"]) -> Float[Array, "B H T K"]:
    """Each device has some of the heads, of all tokens."""
    return _placed(x, {1: SHARE_HEADS, 2: ()})


def _placed(x: Array, axes: dict[int, Names]) -> Array:
    """``x`` with these of its axes along those of the mesh, (): whole; as it is where they do not divide it."""
    mesh = of_context()
    if mesh is None or devices_along(mesh, SHARE_TOKENS) == 1:
        return x
    along: dict[int, Any] = {axis: dividing(mesh, names, x.shape[axis]) for axis, names in axes.items()}
    if any(axes[axis] and names is None for axis, names in along.items()):
        return x
    along[0] = dividing(mesh, SHARE_BATCH, x.shape[0]) or AS_IT_IS
    spec = PartitionSpec(*(along.get(axis, AS_IT_IS) for axis in range(x.ndim)))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
