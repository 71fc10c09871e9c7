"""How far a layer in one of its forms is from the definition: token by token, in float64, on the CPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.cli.layer_cost import Shape
from hope_jax.cli.results import Row
from hope_jax.memory.kernels import Impl


def errors(shape: Shape, impl: Impl) -> Row:
    """Norm of the error divided by the norm of the exact value: of the reads, and of the gradient that differs most.

    The layer has its initial parameters and reads normal numbers, in float32 on the first device. Gradients are of the
    reads times other normal numbers, by parameters and by what is read. Products outside of the memories
    are in full float32, too, whatever the device does by default.
    """
    with jax.default_matmul_precision("highest"):
        reads, gradients = _evaluated(shape, impl, jnp.float32, _drawn(shape))
    expected, slopes = _definition(shape)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(slopes), strict=True)
    return {"reads": _distance(reads, expected), "gradients": max(_distance(*pair) for pair in pairs)}


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the error over the norm of ``expected``; where that is zero, the norm of the error."""
    norm = float(np.linalg.norm(expected))
    return float(np.linalg.norm(found.astype(np.float64) - expected)) / (norm or 1.0)


@functools.cache
def _drawn(shape: Shape) -> tuple[Any, np.ndarray, np.ndarray]:
    """Parameters, what is read, and the weights of the reads; float32."""
    inputs, weights = np.random.default_rng(0).normal(size=(2, *shape.inputs().shape)).astype(np.float32)
    with jax.default_device(jax.devices("cpu")[0]):
        params = jax.jit(shape.layer("auto").start)(jax.random.key(0))
    return jax.tree.map(np.asarray, params), inputs, weights


@functools.cache
def _definition(shape: Shape) -> tuple[np.ndarray, Any]:
    given = jax.tree.map(lambda x: x.astype(np.float64), _drawn(shape))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        return _evaluated(shape, "sequential", jnp.float64, given)


def _evaluated(shape: Shape, impl: Impl, dtype: Any, given: tuple[Any, Any, Any]) -> tuple[np.ndarray, Any]:
    """Reads and gradients, as arrays of numpy."""
    layer, (params, inputs, weights) = shape.layer(impl, dtype), given

    def total(params: Any, inputs: Any) -> tuple[Any, Any]:
        reads = layer.read(params, inputs)
        return jnp.sum(reads * weights), reads

    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, reads), gradients = gradient(params, inputs)
    return jax.tree.map(np.asarray, (reads, gradients))
