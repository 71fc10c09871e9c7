"""Digests of arrays that do not depend on where the parts of an array lie, so that nothing is gathered for them.

Every word of 32 bits is mixed with its place in the whole array, and the results are added modulo 2^32, twice:

    h_i = mix(word_i XOR mix(i)),   digest = (sum_i h_i, sum_i mix(h_i))

``mix`` is a bijection (the last steps of MurmurHash3), so that one altered word always alters both sums; two arrays
that differ in more words have equal digests with a chance of 2^-64. Sums of integers do not depend on their order:
each device adds up its own part, and what moves between devices and processes are two numbers. A digest finds damage,
not forgery.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hope_jax.storage.digests import kind, leaves

BLOCK = 2**16  # words that are mixed at a time on the host: they fit into its cache
FIRST, SECOND = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
SHIFTS = np.uint32(16), np.uint32(13)


def describe_parts(tree: Any) -> Callable[[], dict[str, str]]:
    """Path -> dtype, shape and digest of each array, to be asked for when it is needed.

    What devices have to compute is on its way when this returns: the arrays may then be donated. Arrays in the memory
    of the host are read when the result is asked for, and must not change before.
    """
    named = dict(leaves(tree))
    on_host = all(map(_on_host, named.values()))
    sums = None if on_host else _program(_mesh(tree))(list(named.values()))

    def result() -> dict[str, str]:
        found = [host_sums(np.asarray(leaf)) for leaf in named.values()] if sums is None else np.asarray(sums)
        pairs = zip(named.items(), found, strict=True)
        return {path: f"{kind(leaf)} {int(pair[0]):08x}{int(pair[1]):08x}" for (path, leaf), pair in pairs}

    return result


def _on_host(leaf: Any) -> bool:
    """Whether the whole array can be read without a copy from an accelerator or from another process."""
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices())


def _mesh(tree: Any) -> Any:
    """The mesh that the arrays lie on; None: they lie on one device."""
    places = (leaf.sharding for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    return next((place.mesh for place in places if isinstance(place, NamedSharding)), None)


def _mix(words: Any) -> Any:
    """A bijection of uint32 numbers, each of whose bits depends on all bits; of numpy and of JAX."""
    words = (words ^ (words >> SHIFTS[0])) * FIRST
    words = (words ^ (words >> SHIFTS[1])) * SECOND
    return words ^ (words >> SHIFTS[0])


def host_sums(array: np.ndarray) -> tuple[int, int]:
    """The two sums of an array in the memory of the host."""
    size = min(array.dtype.itemsize, 4)
    words = np.ascontiguousarray(array).reshape(-1).view(f"u{size}")
    sums = np.zeros(2, np.uint32)
    for start in range(0, words.size, BLOCK):
        block = words[start : start + BLOCK].astype(np.uint32)
        places = np.arange(start, start + block.size, dtype=np.uint64).astype(np.uint32)
        mixed = _mix(block ^ _mix(places))
        sums += np.array([mixed.sum(dtype=np.uint32), _mix(mixed).sum(dtype=np.uint32)])
    return int(sums[0]), int(sums[1])


@functools.cache
def _program(mesh: Any) -> Callable[[list[jax.Array]], jax.Array]:
    """The sums [arrays, 2] of many arrays where they lie; every device has the result."""
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda arrays: jnp.stack(list(map(device_sums, arrays))), out_shardings=everywhere)


def device_sums(array: jax.Array) -> jax.Array:
    """The same two sums, uint32 [2], by JAX."""
    words = _words(array)
    places = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = np.prod(words.shape[axis + 1 :], dtype=np.uint64).astype(np.uint32)
        places += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
    mixed = _mix(words ^ _mix(places))
    return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(_mix(mixed), dtype=jnp.uint32)])


def _words(array: jax.Array) -> jax.Array:
    """The bits of an array as uint32, one for each number of up to 32 bits and two for one of 64."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    size = min(array.dtype.itemsize, 4)
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"u{size}")).astype(jnp.uint32)
