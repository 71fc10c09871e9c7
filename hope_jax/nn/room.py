"""How many tokens the caches of a state that grow with the text have room for, and how many they hold."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp


@runtime_checkable
class Bounded(Protocol):
    """A cache, or a mixer's state, that was made for ``capacity`` tokens and has read ``position`` of them.

    A call that reads more than that returns NaN, as a traced program cannot raise: ask ``room_left`` first. Its
    leaves may be stacked over layers.
    """

    @property
    def position(self) -> Any: ...
    @property
    def capacity(self) -> int: ...
    def without_empty_slots(self) -> Any:
        """The same, cut to the slots that are filled."""
        ...


def _is_bounded(node: Any) -> bool:
    return isinstance(node, Bounded)


def _bounded(state: Any) -> list[Bounded]:
    return list(filter(_is_bounded, jax.tree.leaves(state, is_leaf=_is_bounded)))


def room_left(state: Any) -> int | None:
    """Tokens that every growing cache inside ``state`` (any pytree, layers stacked or not) can still take.

    None: no limit. Reads the positions, so it waits for the device: call it between programs, not inside one.
    """
    return min((cache.capacity - int(jnp.max(cache.position)) for cache in _bounded(state)), default=None)


def slots_of(state: Any) -> int | None:
    """Tokens that the growing caches inside ``state`` were made for; None: there are no such caches."""
    return min((cache.capacity for cache in _bounded(state)), default=None)


def without_empty_slots(state: Any) -> Any:
    """``state`` with growing caches cut to the tokens they hold, as a file keeps them. Waits for the device."""

    def cut(node: Any) -> Any:
        return node.without_empty_slots() if isinstance(node, Bounded) else node

    return jax.tree.map(cut, state, is_leaf=_is_bounded)
