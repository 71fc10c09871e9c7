"""Where the arrays of a kernel lie: outside of it, and which part of them one step of its grid sees.

In the memory of the chip an array has two axes or more: a number is [1,1]. The tokens of n chunks are [n*C,F] there,
and numbers per token [n,1,C]. All functions take pytrees.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl

from hope_jax.types import Array

Shape = jax.ShapeDtypeStruct
Index = Callable[[Any], Any]
"""Step of the grid -> number of the block."""


class Place(NamedTuple):
    """The shape of an array outside of the kernel, and the part that a step of the grid sees."""

    shape: Shape
    spec: pl.BlockSpec


def leaves(places: Any) -> list[Place]:
    """All places of a tree."""
    return jax.tree.leaves(places, is_leaf=is_place)


def is_place(node: Any) -> bool:
    """Whether a node is a leaf of a tree of places."""
    return isinstance(node, Place)


def whole(shapes: Any) -> Any:
    """Every step sees the whole array, which has two axes or more."""

    def place(own: Shape) -> Place:
        return Place(own, pl.BlockSpec(own.shape, lambda i: (0,) * len(own.shape)))

    return jax.tree.map(place, shapes)


def one_of(count: int, shapes: Any, index: Index) -> Any:
    """A step sees one of ``count`` arrays."""

    def place(own: Shape) -> Place:
        spec = pl.BlockSpec((None, *own.shape), lambda i: (index(i), *[0] * len(own.shape)))
        return Place(Shape((count, *own.shape), own.dtype), spec)

    return jax.tree.map(place, shapes)


def chunks_of(count: int, shapes: Any, several: int, index: Index) -> Any:
    """A step sees ``several`` of ``count`` chunks; ``shapes`` are those of one chunk, [C] or [C,F]."""

    def place(own: Shape) -> Place:
        if len(own.shape) == 1:
            spec = pl.BlockSpec((several, 1, *own.shape), lambda i: (index(i), 0, 0))
            return Place(Shape((count, 1, *own.shape), own.dtype), spec)
        rows, features = own.shape
        spec = pl.BlockSpec((several * rows, features), lambda i: (index(i), 0))
        return Place(Shape((count * rows, features), own.dtype), spec)

    return jax.tree.map(place, shapes)


def stored(chunks: Any) -> Any:
    """Arrays [n,C] or [n,C,F] as ``chunks_of`` places them."""
    return jax.tree.map(lambda x: x[:, None] if x.ndim == 2 else x.reshape(-1, x.shape[2]), chunks)


def chunked(count: int, arrays: Any, shapes: Any) -> Any:
    """The reverse of ``stored``."""
    return jax.tree.map(lambda x, own: x.reshape(count, *own.shape), arrays, shapes)


def wide(arrays: Any) -> Any:
    """Arrays with two axes or more."""
    return jax.tree.map(lambda x: x.reshape(_wide(x)), arrays)


def wide_shapes(shapes: Any) -> Any:
    """The shapes of ``wide`` arrays."""
    return jax.tree.map(lambda x: Shape(_wide(x), x.dtype), shapes)


def _wide(x: Any) -> tuple[int, ...]:
    return (*[1] * (2 - len(x.shape)), *x.shape)


def get(refs: Any, index: Any = ...) -> Any:
    """Read what is stored, or part ``index`` of it."""
    return jax.tree.map(lambda ref: ref[index], refs)


def get_narrow(refs: Any, shapes: Any) -> Any:
    """Read arrays that are stored ``wide``, in their own ``shapes``."""
    return jax.tree.map(lambda ref, own: ref[...].reshape(own.shape), refs, shapes)


def put(refs: Any, values: Any, index: Any = ...) -> None:
    """Store values, all of them or as part ``index``."""

    def put_one(ref: Any, value: Array) -> None:
        ref[index] = value

    jax.tree.map(put_one, refs, values)


def get_chunk(refs: Any, shapes: Any, chunk: Any) -> Any:
    """Read the tokens of one of the chunks that a step sees."""
    return jax.tree.map(lambda ref, own: ref[_rows(own, chunk)].reshape(own.shape), refs, shapes)


def put_chunk(refs: Any, values: Any, chunk: Any) -> None:
    """Store the tokens of one of the chunks that a step sees."""

    def put_one(ref: Any, value: Array) -> None:
        ref[_rows(value, chunk)] = value if value.ndim == 2 else value[None]

    jax.tree.map(put_one, refs, values)


def _rows(own: Any, chunk: Any) -> Any:
    """Where a chunk of this shape lies."""
    return pl.ds(chunk * own.shape[0], own.shape[0]) if len(own.shape) == 2 else chunk
