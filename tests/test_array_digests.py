"""Digests of arrays: those of plain Python, of numpy and of JAX are equal, wherever the parts of an array lie."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hope_jax.storage.array_digests import BLOCK, _program, describe_parts, device_sums, host_sums

DTYPES = (np.float32, np.int32, np.uint8, np.bool_, np.float16, ml_dtypes.bfloat16, np.float64, np.int64)


def mix(word):
    """The last steps of MurmurHash3, from its definition."""
    word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
    word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
    return word ^ word >> 16


def by_definition(array):
    """The two sums in exact integers, word by word."""
    size = min(array.dtype.itemsize, 4)
    data = array.tobytes()
    words = [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]
    mixed = [mix(word ^ mix(place)) for place, word in enumerate(words)]
    return sum(mixed) % 2**32, sum(map(mix, mixed)) % 2**32


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_numpy_and_jax_compute_the_definition(x64, dtype):
    array = (np.random.default_rng(0).normal(size=(3, 5, 7)) * 3).astype(dtype)
    assert host_sums(array) == by_definition(array)
    assert tuple(map(int, device_sums(jnp.asarray(array)))) == by_definition(array)


@pytest.mark.parametrize("shape", [(), (0,), (BLOCK + 3,)])
def test_arrays_without_axes_without_entries_and_of_several_blocks(shape):
    array = np.asarray(np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(shape) + np.int32(5))
    assert host_sums(array) == by_definition(array) == tuple(map(int, device_sums(jnp.asarray(array))))


def test_an_altered_bit_an_exchange_and_another_place_are_seen():
    draw = np.random.default_rng(1)
    array = draw.integers(0, 2**32, 300, np.uint32)
    sums = {host_sums(array)}
    for place in range(100):
        altered = array.copy()
        altered[place] ^= np.uint32(1 << int(draw.integers(32)))
        sums |= {host_sums(altered), host_sums(np.roll(array, place + 1))}
    assert len(sums) == 201


def test_parts_on_a_mesh_have_the_digest_of_the_whole():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    tree = {"kernel": np.random.default_rng(2).normal(size=(8, 6)).astype(np.float32), "step": np.int32(3)}
    place = {"kernel": NamedSharding(mesh, PartitionSpec("b", "a")), "step": NamedSharding(mesh, PartitionSpec())}
    parts = jax.device_put(tree, place)
    sums = np.asarray(_program(mesh)(jax.tree.leaves(parts)))
    expected = [by_definition(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)]
    assert [tuple(map(int, pair)) for pair in sums] == expected
    assert describe_parts(parts)() == describe_parts(tree)()
    assert describe_parts(tree)()["kernel"] == f"float32[8, 6] {expected[0][0]:08x}{expected[0][1]:08x}"
