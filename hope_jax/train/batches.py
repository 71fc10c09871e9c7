"""What training reads: endless batches that know their position, so that a stopped run can continue.

``data.TextData.train_batches`` gives batches of text; ``ComputedBatches`` makes them from a number; ``JoinedBatches``
puts several together. Read ``loop.py`` next.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from hope_jax.errors import UserError


@runtime_checkable
class Batches(Protocol):
    """An endless iterator of batches."""

    def __next__(self) -> Any: ...

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a position. Raises UserError for what is no position of these batches."""
        ...


class ComputedBatches(Iterator[Any]):
    """The batches ``make(0), make(1), ...``; ``make`` gives the same batch for the same number."""

    def __init__(self, make: Callable[[int], Any]):
        self._make, self._next = make, 0

    def __next__(self) -> Any:
        self._next += 1
        return self._make(self._next - 1)

    def get_state(self) -> dict[str, Any]:
        """The number of the next batch."""
        return {"next": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from such a number."""
        number = state.get("next")
        if state.keys() != {"next"} or type(number) is not int or number < 0:
            raise UserError(f"{state} is no position of computed batches; expected the number of the next batch")
        self._next = number


class JoinedBatches(Iterator[Any]):
    """Each batch joins one batch of each of ``parts``, along the first axis."""

    def __init__(self, *parts: Batches):
        self._parts = parts

    def __next__(self) -> Any:
        return np.concatenate([next(part) for part in self._parts])

    def get_state(self) -> dict[str, Any]:
        """The positions of all parts."""
        return {"parts": [part.get_state() for part in self._parts]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from such positions."""
        positions = state.get("parts")
        if state.keys() != {"parts"} or not isinstance(positions, list) or len(positions) != len(self._parts):
            raise UserError(
                f"{state} is no position of joined batches; expected one of each of {len(self._parts)} parts"
            )
        for part, position in zip(self._parts, positions, strict=True):
            part.set_state(position)
