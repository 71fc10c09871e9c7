"""Which forms of products the memories are computed with; ``impl`` of ``gated_delta``, of rules and of mixers chooses.

``auto``        gradients written by hand: those that are fast on CPU there, plain products on other platforms.
                Derivatives of any order in reverse mode, none in forward mode (``jax.jvp``).
``chunked``     plain matrix products, differentiable in every mode.
``sequential``  token by token, the definition; what is not a recurrence is computed as in ``chunked``.
``pallas``      as ``chunked``, but the loop over chunks is one kernel on a TPU, ``kernels/pallas.py``. Reverse mode.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
from jax import lax

from hope_jax.errors import check_word
from hope_jax.levels import Loop
from hope_jax.memory import products
from hope_jax.memory.kernels import cpu
from hope_jax.types import Array

Impl = Literal["auto", "chunked", "sequential", "pallas"]


class Products(NamedTuple):
    """The functions of ``memory/products.py``, in one of their forms."""

    matmul: Callable[[Array, Array], Array]
    matmul_nt: Callable[[Array, Array], Array]
    matmul_tn: Callable[[Array, Array], Array]
    gram: Callable[[Array], Array]
    inverse: Callable[[Array], Array]
    solve: Callable[[Array, Array, Array, Array], Array]
    shifted_sum: Callable[[Array, Array], Array]


def _products(form: ModuleType) -> Products:
    of_matrices = (form.matmul, form.matmul_nt, form.matmul_tn, form.gram)
    return Products(*of_matrices, form.unit_lower_inverse, form.solve_unit_lower, form.shifted_sum)


PLAIN, AUTO = _products(products), _products(cpu)


def products_of(impl: Impl) -> Products:
    """The products that ``impl`` asks for. Raises UserError for another word."""
    check_word("impl", impl, Impl)
    return AUTO if impl == "auto" else PLAIN


def kernel_loop(impl: Impl) -> Loop | None:
    """The kernel that runs a step over chunks of tokens; None: there is none, ``lax.scan`` does."""
    if impl != "pallas":
        return None
    from hope_jax.memory.kernels import pallas  # not before somebody asks for it: the import takes long

    return pallas.scan


def what_runs(impl: Impl, platform: str) -> str:
    """What runs the chunks of a memory on a platform, as JAX calls it, in words."""
    if impl == "sequential":
        return "a loop over tokens"
    if kernel_loop(impl) is None:
        return "a loop over chunks"
    return "one kernel over all chunks" + ("" if platform == "tpu" else f", interpreted on {platform}, which is slow")


def inside_kernel(impl: Impl) -> Impl:
    """How the step of a loop is computed: a kernel can hold no other."""
    return "chunked" if impl == "pallas" else impl


def chunk_loop(impl: Impl) -> Loop:
    """What runs a step over chunks of tokens."""
    return kernel_loop(impl) or _scan


def _scan(step: Callable[..., tuple[Any, Any]], state: Any, chunks: Any) -> tuple[Any, Any]:
    return lax.scan(jax.checkpoint(step), state, chunks)
