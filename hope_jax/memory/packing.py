"""How the boxes of a self-modifying head lie in memory: in stacks of boxes of one shape.

The first layers of all boxes have the same keys. Those of a stack lie side by side and make one wide matrix, [K, N*F]:
products with the keys and updates are one wide product. Later layers have keys of their own and are stacked, [N,F,V].
Packed weights are the tuple (first layers of the first stack, its later layers ..., those of the second stack ...).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hope_jax.levels import Due
from hope_jax.memory.architectures import Architecture, Weights
from hope_jax.memory.chunked import apart, side_by_side
from hope_jax.types import Array


class Boxes(NamedTuple):
    """One value per group of boxes. Initial weights are [in, out] for the memory, one box, [N, in, out] for others."""

    memory: Any
    projections: Any
    gates: Any


@dataclass(frozen=True)
class Stack:
    """Boxes that follow each other and have layers of the same shapes [in, out]; their initial scales may differ.

    ``groups`` are the group of each box, an index of ``Boxes``, ``place`` is where their packed weights begin.
    """

    architecture: Architecture
    shapes: tuple[tuple[int, int], ...]
    groups: tuple[int, ...]
    place: int

    def layers(self, weights: Weights) -> Weights:
        """The packed layers of this stack."""
        return weights[self.place : self.place + len(self.shapes)]

    def holds(self, other: Architecture, shapes: tuple[tuple[int, int], ...]) -> bool:
        """Whether a box of this architecture and these shapes may be added."""
        return self.shapes == shapes and replace(other, scales=self.architecture.scales) == self.architecture

    def of_group(self, weights: Weights, group: int) -> tuple[int, Array, Weights]:
        """How many boxes a group has, their first layers side by side, and the layers after those."""
        start, count = self.groups.index(group), self.groups.count(group)
        first, *later = self.layers(weights)
        features, end = self.shapes[0][1], start + count
        return count, first[:, features * start : features * end], tuple(w[start:end] for w in later)


def stacks_of(architectures: Boxes, initial: Boxes) -> tuple[Stack, ...]:
    """The stacks of boxes with these architectures and initial weights."""
    stacks: list[Stack] = []
    for group, (architecture, weights) in enumerate(zip(architectures, initial, strict=True)):
        groups = (group,) * (1 if group == 0 else len(weights[0]))
        shapes = tuple(w.shape[-2:] for w in weights)
        if stacks and stacks[-1].holds(architecture, shapes):
            stacks[-1] = replace(stacks[-1], groups=stacks[-1].groups + groups)
        elif groups:
            place = stacks[-1].place + len(stacks[-1].shapes) if stacks else 0
            stacks.append(Stack(architecture, shapes, groups, place))
    return tuple(stacks)


def pack(stacks: Sequence[Stack], initial: Boxes) -> Weights:
    """Weights per group as packed weights."""
    of_groups = [tuple(w[None] for w in initial.memory), initial.projections, initial.gates]
    packed: list[Array] = []
    for stack in stacks:
        groups = [of_groups[group] for group in dict.fromkeys(stack.groups)]
        first, *later = [jnp.concatenate(layers) for layers in zip(*groups, strict=True)]
        packed += [side_by_side(first), *later]
    return tuple(packed)


def unpack(stacks: Sequence[Stack], weights: Weights) -> list[Weights]:
    """The layers of each box, in their order."""
    boxes = []
    for stack in stacks:
        first, *later = stack.layers(weights)
        layers = (apart(first, len(stack.groups)), *later)
        boxes += [tuple(w[box] for w in layers) for box in range(len(stack.groups))]
    return boxes


def where_due(stacks: Sequence[Stack], due: Sequence[Due], new: Weights, old: Weights) -> Weights:
    """``new`` where ``due`` of a box's group is true, elsewhere ``old``."""
    masks: list[Array] = []
    for stack in stacks:
        of_boxes = jnp.stack([jnp.asarray(due[group]) for group in stack.groups])
        columns = jnp.repeat(of_boxes, stack.shapes[0][1])[None]
        masks += [columns, *[of_boxes[:, None, None]] * (len(stack.shapes) - 1)]
    return jax.tree.map(jnp.where, tuple(masks), new, old)
