"""Which forms of products the memories are computed with; ``impl`` of ``gated_delta``, of rules and of mixers chooses.

``auto``        gradients written by hand: those that are fast on CPU there, plain products on other platforms.
                Derivatives of any order in reverse mode, none in forward mode (``jax.jvp``).
``chunked``     plain matrix products, differentiable in every mode.
``sequential``  token by token, the definition; what is not a recurrence is computed as in ``chunked``.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Literal, NamedTuple

from hope_jax.errors import check_word
from hope_jax.memory import products
from hope_jax.memory.kernels import cpu
from hope_jax.types import Array

Impl = Literal["auto", "chunked", "sequential"]


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
