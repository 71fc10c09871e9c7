"""All boxes of a self-modifying head side by side, so that a segment is few and large products.

Every box is written with the same keys, so all first layers together are one linear memory [R,K] whose rows are those
of the memory, the projections and the gates in turn. Later layers have keys of their own; those of boxes with equal
shapes are stacked, [N, out, in]. ``self_modifying.scan`` joins the groups once per call.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.memory.architectures import Weights
from hope_jax.memory.block import Coefficients, Written, advance, erase_matrix
from hope_jax.memory.products import split
from hope_jax.memory.rule import LayerWrite, Rule
from hope_jax.memory.triangular import unit_lower_inverse
from hope_jax.types import Array, Float


@dataclass(frozen=True)
class Stack:
    """Neighbouring groups whose boxes have equal rules and shapes.

    Attributes:
      rule: theirs.
      groups: their places among (memory, projections, gates).
      counts: boxes of each group.
      rows: outputs of one first layer.
    """

    rule: Rule
    groups: tuple[int, ...]
    counts: tuple[int, ...]
    rows: int

    @property
    def boxes(self) -> int:
        """N, boxes of all groups."""
        return sum(self.counts)

    @property
    def starts(self) -> tuple[int, ...]:
        """Place of each group's first box."""
        return tuple(sum(self.counts[:i]) for i in range(len(self.counts)))

    @property
    def later(self) -> int:
        """Layers after the first."""
        return self.rule.architecture.layers - 1


def stacks_of(rules: Sequence[Rule], counts: Sequence[int], weights: Sequence[Weights]) -> tuple[Stack, ...]:
    """The groups as stacks; a group without boxes is in none. ``weights`` of each group, for their shapes."""
    stacks: list[Stack] = []
    signature = None
    for i, (rule, count, layers) in enumerate(zip(rules, counts, weights, strict=True)):
        if not count:
            continue
        start_aside = dataclasses.replace(rule.architecture, scales=(0.0,) * len(layers))
        same = (dataclasses.replace(rule, architecture=start_aside), [w.shape[-2:] for w in layers])
        if stacks and same == signature:
            last = stacks.pop()
            stacks.append(dataclasses.replace(last, groups=(*last.groups, i), counts=(*last.counts, count)))
        else:
            stacks.append(Stack(rule, (i,), (count,), layers[0].shape[-2]))
        signature = same
    return tuple(stacks)


def parts(stacks: Sequence[Stack]) -> tuple[int, ...]:
    """Rows of each group in the first layers' common memory."""
    return tuple(count * stack.rows for stack in stacks for count in stack.counts)


def join(stacks: Sequence[Stack], groups: Sequence[Weights]) -> Weights:
    """(first layers [R,K], then each stack's later layers [N, out, in]); () stays (). The memory has no axis N yet."""
    if not groups[0]:
        return ()
    present = [i for stack in stacks for i in stack.groups]
    first = _concatenate([groups[i][0].reshape(-1, groups[i][0].shape[-1]) for i in present])
    boxed = [tuple(w[None] for w in one) if i == 0 else one for i, one in enumerate(groups)]
    later = (
        _concatenate([boxed[i][layer] for i in stack.groups]) for stack in stacks for layer in range(1, stack.later + 1)
    )
    return (first, *later)


def apart(stacks: Sequence[Stack], joined: Weights) -> dict[int, Weights]:
    """The weights of each group again: what ``join`` put together."""
    if not joined:
        return {i: () for stack in stacks for i in stack.groups}
    groups: dict[int, list[Array]] = {}
    present = [(i, count) for stack in stacks for i, count in zip(stack.groups, stack.counts, strict=True)]
    for (i, count), first in zip(present, split(joined[0], parts(stacks), axis=0), strict=True):
        groups[i] = [first.reshape(count, -1, first.shape[-1])]
    later = iter(joined[1:])
    for stack in stacks:
        for _ in range(stack.later):
            for i, boxes in zip(stack.groups, split(next(later), stack.counts, axis=0), strict=True):
                groups[i].append(boxes)
    return {i: tuple(w.reshape(w.shape[1:]) if i == 0 else w for w in layers) for i, layers in groups.items()}


def per_box(outputs: Float[Array, "T R"], boxes: int) -> Float[Array, "N T F"]:
    """Columns of the first layers' outputs, box by box."""
    return jnp.moveaxis(outputs.reshape(len(outputs), boxes, -1), 1, 0)


def columns(outputs: Float[Array, "N T F"]) -> Float[Array, "T R"]:
    """The reverse of ``per_box``."""
    return jnp.moveaxis(outputs, 0, 1).reshape(outputs.shape[1], -1)


# ---------------------------------------------------------------- writing them


class Layer(NamedTuple):
    """One linear memory, or N of them stacked, with what is written into it (``block.advance``)."""

    memory: Float[Array, "*N V K"]
    momentum: Float[Array, "*N V K"] | None
    base: Float[Array, "*N V K"] | None
    keys: Float[Array, "*N C K"]
    writes: Float[Array, "*N C V"]
    erase: Float[Array, "*N C G"] | None

    def each(self, function):
        """``function`` of one linear memory, mapped over the stack if this is one."""
        return jax.vmap(function) if self.memory.ndim == 3 else function


def as_one(firsts: list[LayerWrite], stacks: tuple[Stack, ...], keys: Float[Array, "C K"]) -> LayerWrite:
    """The writes of all first layers as those of one memory; a group's boxes have one erase, that of the first."""
    writes = jnp.concatenate([columns(one.writes) for one in firsts], axis=1)
    erases = [one.erase for one in firsts if one.erase is not None]
    if not erases:
        return LayerWrite(keys, writes, None)
    of_groups = [erase[box] for erase, stack in zip(erases, stacks, strict=True) for box in stack.starts]
    return LayerWrite(keys, writes, jnp.stack(of_groups, axis=1))


def advance_all(layers: list[Layer], rows: tuple[int, ...], terms: Coefficients) -> list[Written]:
    """Write all layers; their triangular systems are inverted together, in one sequence of products.

    ``rows`` of each part of the first memory; the others have one part.
    """
    inverses = _inverses(layers, terms)
    written = []
    for index, (layer, inverse) in enumerate(zip(layers, inverses, strict=True)):
        of_one = functools.partial(_advance_one, terms, rows if index == 0 else None)
        written.append(layer.each(of_one)(layer, inverse))
    return written


def _advance_one(terms: Coefficients, rows: tuple[int, ...] | None, layer: Layer, inverse: Array | None) -> Written:
    return advance(*layer, terms, inverse, rows)


def _inverses(layers: list[Layer], terms: Coefficients) -> list[Array | None]:
    """(I + L)^-1 of every layer, as constants: ``solve_unit_lower`` has the derivatives. None without erase."""
    lowers = [
        None if layer.erase is None else layer.each(lambda one: erase_matrix(one.keys, one.erase, terms))(layer)
        for layer in layers
    ]
    flat = [jax.lax.stop_gradient(lower).reshape(-1, *lower.shape[-2:]) for lower in lowers if lower is not None]
    if not flat:
        return lowers
    cuts = np.cumsum([len(one) for one in flat])[:-1]
    found = iter(jnp.split(jax.vmap(unit_lower_inverse)(jnp.concatenate(flat)), cuts))
    return [None if lower is None else next(found).reshape(lower.shape) for lower in lowers]


def first_box(layer: Layer, erased: Array | None, rows: int) -> tuple[Layer, Array | None]:
    """One layer of the first box, and what is erased there."""
    if layer.memory.ndim == 3:
        return jax.tree.map(lambda x: x[0], (layer, erased))
    sizes = (rows, layer.memory.shape[0] - rows)
    memory, momentum, base = jax.tree.map(lambda x: split(x, sizes, axis=0)[0], layer[:3])
    writes, erased = jax.tree.map(lambda x: split(x, sizes, axis=1)[0], (layer.writes, erased))
    return Layer(memory, momentum, base, layer.keys, writes, None), erased


def _concatenate(arrays: list[Array]) -> Array:
    return jnp.concatenate(arrays) if len(arrays) > 1 else arrays[0]
