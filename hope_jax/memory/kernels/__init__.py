"""The forms of products that memories are computed with; ``impl`` of ``gated_delta``, rules and mixers chooses one.

``auto``        gradients written by hand; on CPU those that are fast there, on other platforms plain products.
                Derivatives of any order in reverse mode, none in forward mode (``jax.jvp``).
``chunked``     plain matrix products, differentiable in every mode.
``sequential``  token by token, the definition; all but the recurrence is computed as in ``chunked``.
``pallas``      as ``chunked``, but the loop over chunks is one kernel on a TPU, ``kernels/pallas.py``, with products
                that fit its matrix unit, ``kernels/inside.py``. Reverse mode.

``chunked`` and ``pallas`` may end in ``_bfloat16`` or ``_bfloat16_3x``: products of bfloat16 numbers in one pass or in
three, ``kernels/bfloat16.py``. Sums, gates, inverses and states stay in float32; the decays of momentum are such
products, too. Memories with a link (moneta, memora) stay in float32. Reverse mode.
"""

import functools
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Literal, NamedTuple, cast

import jax.numpy as jnp

from hope_jax.errors import check_word
from hope_jax.kept import scan_pieces
from hope_jax.levels import Loop
from hope_jax.memory import products
from hope_jax.memory.kernels import bfloat16, cpu, inside
from hope_jax.types import Array

Impl = Literal[
    "auto",
    "chunked",
    "sequential",
    "pallas",
    "chunked_bfloat16",
    "chunked_bfloat16_3x",
    "pallas_bfloat16",
    "pallas_bfloat16_3x",
]


class Products(NamedTuple):
    """The functions of ``memory/products.py``, in one of their forms.

    ``joined``: a few large products are faster than several small ones.
    """

    matmul: Callable[[Array, Array], Array]
    matmul_nt: Callable[[Array, Array], Array]
    matmul_tn: Callable[[Array, Array], Array]
    gram: Callable[[Array], Array]
    inverse: Callable[[Array], Array]
    solve: Callable[[Array, Array, Array, Array], Array]
    shifted_sum: Callable[[Array, Array], Array]
    joined: bool = False

    def matmul_sum(self, *pairs: tuple[Array, Array]) -> Array:
        """The sum of a b [*N,M,V] over pairs (a [*N,M,C], b [*N,C,V]); C may differ. One product if ``joined``."""
        if not self.joined:
            return functools.reduce(jnp.add, itertools.starmap(self.matmul, pairs))
        left, right = zip(*pairs, strict=True)
        return self.matmul(jnp.concatenate(left, axis=-1), jnp.concatenate(right, axis=-2))

    def matmul_tn_each(self, a: Array, *right: Array) -> list[Array]:
        """a^T b [*N,M,V] of one a [*N,C,M] for each b [*N,C,V]; V may differ. One product if ``joined``."""
        if not self.joined:
            return [self.matmul_tn(a, b) for b in right]
        cuts = list(itertools.accumulate(b.shape[-1] for b in right[:-1]))
        return jnp.split(self.matmul_tn(a, jnp.concatenate(right, axis=-1)), cuts, axis=-1)


def _products(form: ModuleType) -> Products:
    of_matrices = (form.matmul, form.matmul_nt, form.matmul_tn, form.gram)
    return Products(*of_matrices, form.unit_lower_inverse, form.solve_unit_lower, form.shifted_sum)


PLAIN, AUTO, INSIDE = _products(products), _products(cpu), _products(inside)._replace(joined=True)
NARROW = {
    "bfloat16": Products(*bfloat16.functions(1), products.shifted_sum),
    "bfloat16_3x": Products(*bfloat16.functions(3), products.shifted_sum),
}
"""Ending of ``impl`` -> its products."""


def products_of(impl: Impl) -> Products:
    """The products that ``impl`` asks for. Raises UserError for another word."""
    check_word("impl", impl, Impl)
    if impl == "chunked" and inside.in_kernel.get():
        return INSIDE
    return AUTO if impl == "auto" else NARROW.get(impl.partition("_")[2], PLAIN)


def runs_kernel(impl: Impl) -> bool:
    """Whether ``impl`` asks for a kernel."""
    return impl.startswith("pallas")


def kernel_loop(impl: Impl) -> Loop | None:
    """The kernel that runs a step over chunks of tokens; None: there is none, ``lax.scan`` does."""
    if not runs_kernel(impl):
        return None
    from hope_jax.memory.kernels import pallas  # only where it is used: the import takes long

    return pallas.scan


def what_runs(impl: Impl, platform: str) -> str:
    """In words, what runs the chunks of a memory on a platform, named as JAX does."""
    if impl == "sequential":
        return "a loop over tokens"
    narrow = impl.partition("_")[2]
    found = "one kernel over all chunks" if runs_kernel(impl) else "a loop over chunks"
    if narrow:
        found += f" in {'three passes' if narrow.endswith('3x') else 'one pass'} of bfloat16"
    slow = runs_kernel(impl) and platform != "tpu"
    return found + (f", interpreted on {platform}, which is slow" if slow else "")


def inside_kernel(impl: Impl) -> Impl:
    """The ``impl`` of the step of a loop: inside a kernel there is no other kernel."""
    return cast(Impl, impl.replace("pallas", "chunked"))


def chunk_loop(impl: Impl) -> Loop:
    """The function that runs a step over chunks of tokens."""
    return kernel_loop(impl) or scan_pieces
