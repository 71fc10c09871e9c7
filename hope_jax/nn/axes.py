"""Logical axis names: every axis of every parameter has a name that says what it counts.

Each module lists the names of its parameters in ``axes()``, below the place where it makes them; ``LanguageModel.axes``
joins them to one tree, shaped like the parameters. Which parameters are matrices (``matrices``) and which decay
(``decays``) follows from these names, and never from the parameter's own name.

>>> axes = LanguageModel(MODELS["hope-tiny"]).axes()
>>> axes["blocks"]["mixer"]["conv_k"]["kernel"]
('layers', 'taps', 'embed')
"""

from collections.abc import Callable
from typing import Any

from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from hope_jax.errors import UserError, closest
from hope_jax.optim.matrices import ADAMW, MATRIX, Labels, MuonDimensionNumbers

# Axes that count equal parameters. As leading axes they are no part of a matrix.
COPIES = {
    "layers": "blocks of the model, one after another",
    "heads": "independent heads of a mixer",
    "memories": "memories of one head that have equal shapes",
}
# Axes of the layers' own weights, which are matrices and decay.
FEATURES = {
    "embed": "features of the model, between its blocks",
    "hidden": "hidden features of a feed-forward part",
    "all_heads": "features of all heads side by side",
    "cell_gates": "the four gates of every cell of an LSTM",
}
# Axes of the initial weights of memories; these are matrices too, but must not decay.
MEMORY_FEATURES = {
    "head_dim": "features of one head",
    "memory_hidden": "hidden features of an MLP memory",
    "gate": "the number or numbers that a gate memory returns",
    "rank": "inner features of a low-rank map, or of the Delta of a level",
}
OTHERS = {
    "vocab": "token ids",
    "taps": "tokens that a convolution sees",
    "levels": "levels of a feed-forward part",
    "persistent": "learned vectors in front of every sequence",
    "places": "places of a token in a period",
}
AXES = COPIES | FEATURES | MEMORY_FEATURES | OTHERS
"""Every axis name and what it counts."""

Names = tuple[str, ...]
Axes = dict[str, Any]


def dense_axes(rows: str, columns: str, bias: bool = False) -> Axes:
    """Names of the parameters of ``layers.dense``."""
    return {"kernel": (rows, columns)} | ({"bias": (columns,)} if bias else {})


def norm_axes(bias: bool = False) -> Axes:
    """Names of the parameters of a norm over the model's features: ``layers.RMSNorm``, ``layers.LayerNorm``."""
    return {"scale": ("embed",)} | ({"bias": ("embed",)} if bias else {})


def conv_axes(channels: str, bias: bool = False) -> Axes:
    """Names of the parameters of a ``layers.ShortConv``."""
    return {"kernel": ("taps", channels)} | ({"bias": (channels,)} if bias else {})


def memory_axes(name: str, layers: int, copies: Names = (), answer: str = "head_dim") -> Axes:
    """Names of the initial weights ``start_<name>_<layer>`` of the memories of every head."""
    sizes = ["head_dim", *["memory_hidden"] * (layers - 1), answer]
    return {f"start_{name}_{i}": ("heads", *copies, *sizes[i : i + 2]) for i in range(layers)}


def stacked(axis: str, axes: Axes) -> Axes:
    """The names of parameters that are stacked along a new first ``axis``."""
    return {name: stacked(axis, x) if isinstance(x, dict) else (axis, *x) for name, x in axes.items()}


def flat(axes: Axes) -> dict[str, Names]:
    """The names by the path of the parameter, as ``keystr`` writes it. Raises UserError for a name not in ``AXES``."""
    leaves = tree_leaves_with_path(axes, is_leaf=lambda node: isinstance(node, tuple))
    found = {keystr(path): names for path, names in leaves}
    for path, names in found.items():
        if unknown := [name for name in names if name not in AXES]:
            raise UserError(f"parameter {path} has an axis {unknown[0]!r}; {closest(unknown[0], AXES)}")
    return found


def matrices(axes: Axes) -> Labels:
    """``params -> labels`` of ``optim.matrices``: every copy of a layer's or memory's weights is a matrix [in, out].

    Embeddings, heads, convolutions, gates, scales and biases are no matrices.
    """

    def label(names: Names) -> Any:
        copies = next((i for i, name in enumerate(names) if name not in COPIES), len(names))
        inner = names[copies:]
        if len(inner) != 2 or not set(inner) <= (FEATURES.keys() | MEMORY_FEATURES.keys()):
            return ADAMW
        return MuonDimensionNumbers(copies, copies + 1) if copies else MATRIX

    return of_parameters(axes, label)


def decays(axes: Axes) -> Callable[[Any], Any]:
    """``params -> tree of booleans``: layers' weights, embeddings and heads decay, in the sense of weight decay."""

    def is_decayed(names: Names) -> bool:
        inner = names[1:] if names[:1] == ("layers",) else names
        return len(inner) == 2 and set(inner) <= (FEATURES.keys() | {"vocab"})

    return of_parameters(axes, is_decayed)


def of_parameters(axes: Axes, rule: Callable[[Names], Any]) -> Callable[[Any], Any]:
    """``params -> tree``: ``rule(names)`` for every parameter. ``params`` may be a part of the model's tree.

    Raises UserError, also from the function that is returned, for names that are unknown or do not fit a parameter.
    """
    names_at = flat(axes)

    def answer(path: tuple[Any, ...], leaf: Any) -> Any:
        where = keystr(path)
        names = names_at.get(where)
        if names is None or len(names) != leaf.ndim:
            expected = "one name per axis from the method axes() of its module"
            raise UserError(f"parameter {where} of shape {leaf.shape} has the axis names {names}; expected {expected}")
        return rule(names)

    return lambda params: tree_map_with_path(answer, params)
