"""Which parameters are matrices, and along which axes: one answer for every optimizer that treats matrices as such.

A *label* per leaf says it: ``"matrix"`` (the first axis by all others), ``"adamw"`` (not a matrix), or optax's
``MuonDimensionNumbers(reduction_axis, output_axis)`` (a matrix along these axes, every other axis counts copies).
``matrix_labels`` makes the function ``params -> labels``; ``matrix_views`` turns labels into ``MatrixView`` objects.
In ``update`` the function gets the gradients, widened to float32: labels may depend on paths and shapes alone.

>>> m3(1e-3)                                                     # every leaf of two axes
>>> m3(1e-3, matrices=matrix_labels(batch_axes={"blocks": 1}))   # below "blocks" the leading axis counts layers
>>> m3(1e-3, matrices=lambda params: jax.tree.map(..., params))  # any labels: MuonDimensionNumbers((0, 1), 2), ...
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_map_with_path
from jaxtyping import Inexact
from optax.contrib import MuonDimensionNumbers

from hope_jax.errors import UserError, whole
from hope_jax.optim.checks import check_function, leaf_name
from hope_jax.types import Array

MATRIX = "matrix"
ADAMW = "adamw"
NOT_MATRICES = ("*embed*", "head", "head_*", "*_head")

Labels = Callable[[Any], Any]


@dataclass(frozen=True)
class MatrixView:
    """How one parameter is seen as a stack of matrices. For a Flax kernel rows are inputs, columns outputs.

    Attributes:
      shape: of the parameter.
      batch: axes that count matrices.
      rows: axes that together are a matrix's rows.
      columns: axes that together are its columns; none for a vector, which is one column.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of ``to_matrices``: the batch axes, rows, columns."""
        sizes = [math.prod(self.shape[axis] for axis in axes) for axes in (self.rows, self.columns)]
        return (*(self.shape[axis] for axis in self.batch), *sizes)

    def to_matrices(self, leaf: Array) -> Inexact[Array, "*batch rows columns"]:
        """The parameter (or its gradient) as matrices; batch axes keep their places among themselves."""
        return leaf.transpose(self._order).reshape(self.matrix_shape)

    def from_matrices(self, matrices: Array) -> Array:
        """What ``to_matrices`` was given."""
        axes = matrices.reshape(tuple(self.shape[axis] for axis in self._order))
        return axes.transpose(sorted(range(len(self.shape)), key=self._order.__getitem__))

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.batch, *self.rows, *self.columns)


def matrix_labels(batch_axes: Mapping[str, int] | None = None, exclude: Sequence[str] = NOT_MATRICES) -> Labels:
    """The usual rule, ``params -> labels``: leaves of two axes are matrices, but no embeddings and heads (SPEC 5.1).

    Nobody can tell along which axes a kernel of more axes is a matrix (a convolution's [3, 3, in, out] is one of
    [9 in, out], the output of attention [heads, k, out] one of [heads k, out], its queries [in, heads, k] one of
    [in, heads k]), so such leaves are none until their axes are declared.

    Args:
      batch_axes: name on a leaf's path -> leading axes that count copies below it, added up along the path:
        ``{"blocks": 1, "start_*": 1}`` for heads of layers. What remains decides whether the leaf is a matrix, so a
        vector stacked over layers is none. Names are shell patterns, case ignored; a pattern may match nothing, because
        ``optax.partition`` and ``by_level`` show every optimizer only its own part of the tree.
      exclude: patterns of names on the path of leaves that are no matrices, case ignored.
    """
    counts = {pattern.lower(): axes for pattern, axes in (batch_axes or {}).items()}
    for pattern, axes in counts.items():
        whole(f"batch_axes[{pattern!r}]", axes, 0, "leading axes")
    if isinstance(exclude, str):
        raise UserError(f"exclude is {exclude!r}; expected several patterns, such as ({exclude!r},)")
    excluded = [pattern.lower() for pattern in exclude]

    def label(path: tuple[Any, ...], leaf: Any) -> Any:
        names = [keystr((entry,), simple=True).lower() for entry in path]
        batch = sum(n for pattern, n in counts.items() for name in names if fnmatchcase(name, pattern))
        if batch > leaf.ndim:
            raise UserError(f"{leaf_name(path)} has shape {leaf.shape}; batch_axes takes {batch} leading axes of it")
        if leaf.ndim - batch != 2 or any(fnmatchcase(name, pattern) for name in names for pattern in excluded):
            return ADAMW
        return MuonDimensionNumbers(batch, batch + 1) if batch else MATRIX

    return lambda params: tree_map_with_path(label, params)


def labels_or_default(matrices: Labels | None, exclude: Sequence[str] = NOT_MATRICES) -> Labels:
    """An optimizer's argument ``matrices``: None is the usual rule. Raises UserError for what is no function."""
    check_function("matrices", matrices, "params -> labels, such as matrix_labels()")
    return matrix_labels(exclude=exclude) if matrices is None else matrices


def matrix_views(params: Any, labels: Labels) -> Any:
    """For every leaf its ``MatrixView``, or None where the label is not that of a matrix.

    The result goes second into ``jax.tree.map``, as None is no leaf. Raises UserError for a label that does not fit.
    """
    found = labels(params)
    try:
        jax.tree.structure(params).flatten_up_to(found)
    except (ValueError, TypeError) as error:
        raise UserError(f"labels are not shaped like the parameters; return one label per leaf ({error})") from None
    return tree_map_with_path(_view, params, found)


def matrix_or_column_views(params: Any, labels: Labels) -> Any:
    """As ``matrix_views``, but a leaf that is no matrix is a single column, [size, 1]."""

    def or_column(leaf: Any, view: MatrixView | None) -> MatrixView:
        return view or MatrixView(leaf.shape, (), tuple(range(leaf.ndim)), ())

    return jax.tree.map(or_column, params, matrix_views(params, labels))


def partition_labels(labels: Labels) -> Labels:
    """The same labels as ``optax.partition`` wants them: "matrix" or "adamw"."""
    return lambda params: jax.tree.map(lambda _, view: MATRIX if view else ADAMW, params, matrix_views(params, labels))


def dimension_numbers(labels: Labels) -> Callable[[Any], Any]:
    """The same labels as optax's Muon wants them: dimension numbers, None for a leaf that is no matrix."""

    def numbers(_: Any, view: MatrixView | None) -> MuonDimensionNumbers | None:
        return MuonDimensionNumbers(view.rows, view.columns) if view else None

    return lambda params: jax.tree.map(numbers, params, matrix_views(params, labels))


def by_largest(x: Inexact[Array, "*batch rows columns"]) -> tuple[Array, Array]:
    """Matrices divided by their largest entry, so that squares are finite; and that entry, 1 where all are zeros."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0.0))  # it cancels
    largest = jnp.where(largest > 0, largest, 1.0)
    return x / largest, largest


def squared_norm(x: Inexact[Array, "*batch rows columns"]) -> Array:
    """Squared Frobenius norm of each matrix, [..., 1, 1]."""
    return jnp.sum(jnp.square(jnp.abs(x)), axis=(-2, -1), keepdims=True)


def _view(path: tuple[Any, ...], leaf: Any, label: Any) -> MatrixView | None:
    if isinstance(label, str) and label == ADAMW:
        return None
    if isinstance(label, str) and label == MATRIX:
        label = MuonDimensionNumbers(0, tuple(range(1, leaf.ndim)))
    if not isinstance(label, MuonDimensionNumbers):
        raise UserError(f"{leaf_name(path)} is labelled {label!r}; expected 'matrix', 'adamw' or MuonDimensionNumbers")
    rows, columns = (np.atleast_1d(axes).tolist() for axes in (label.reduction_axis, label.output_axis))
    used = [axis % leaf.ndim for axis in (*rows, *columns) if -leaf.ndim <= axis < leaf.ndim]
    if leaf.ndim < 2 or not rows or not columns or len(set(used)) != len(rows) + len(columns):
        raise UserError(
            f"{leaf_name(path)} of shape {leaf.shape} is labelled {label}; expected distinct axes of a matrix"
        )
    batch = tuple(axis for axis in range(leaf.ndim) if axis not in used)
    return MatrixView(leaf.shape, batch, tuple(used[: len(rows)]), tuple(used[len(rows) :]))
