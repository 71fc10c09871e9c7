"""Batches of windows for training (endless, shuffled, resumable) and for evaluation (fixed).

Training order is one endless stream, a fresh permutation of all windows per epoch, of which process i of n
takes every n-th batch row: n processes with batches of B see exactly what one process with batches of nB sees.
A mixture has a permutation for each of its sources, which take turns by their weights.
Read tasks/recall.py next for a task that needs no text.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from jaxtyping import Int, Int32

from hope_jax.data.text.windows import Mixture
from hope_jax.errors import UserError, check_seed, whole

READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
"""Batches read in the background while the device works."""


class TrainBatches:
    """Endless iterator of int32 [B, T + 1] whose position can be saved and restored exactly.

    The state is the same for all processes that are at the same step, so one of them may save it for all.

    Args:
        windows: int32 [T + 1] each; the whole training split, the same for all processes.
        fingerprint: of the windows.
        batch: B, windows per step of this process, at most its share of the windows.
        seed: of the order, in 0 .. 2**32 - 1.
        process_index, process_count: this process takes rows process_index, process_index + process_count, ...

    Raises:
        UserError: a number outside its range.
    """

    def __init__(
        self, windows: Sequence, fingerprint: str, *, batch: int, seed: int, process_index: int, process_count: int
    ):
        batch, seed, count = whole("batch", batch), check_seed(seed), whole("process_count", process_count)
        self._order = {"batch": batch, "seed": seed, "process_count": count, "fingerprint": fingerprint}
        share = len(windows) // count
        if not 0 <= process_index < count:
            raise UserError(f"process_index must be in 0..process_count - 1, got {process_index} of {count}")
        if batch > share:
            raise UserError(
                f"a batch of {batch} is larger than the {share} windows that each of {count} processes has to train "
                "on: use a smaller batch or length, or more text"
            )
        # The pipeline carries window numbers and reads at its end: half the time of carrying windows.
        batches = _order(windows, seed)[process_index::count].batch(batch).map(functools.partial(_read, windows))
        self._iterator = iter(batches.to_iter_dataset(READ_AHEAD))

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Int32[np.ndarray, "B window"]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch handed out, and what it is a position of; plain JSON values."""
        return {**self._order, "position": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues exactly after the batch at which the state was taken.

        UserError for a state of another batch size, seed, number of processes or corpus, or of something else.
        """
        names = {*self._order, "position"}
        if state.keys() != names:
            raise UserError(f"this is no data position: it has the fields {sorted(state)}, expected {sorted(names)}")
        for name, value in self._order.items():
            if state[name] != value:
                raise UserError(
                    f"the saved data position belongs to {name} {state[name]}, this run has {value}: resume with the "
                    "same, or start a new run"
                )
        self._iterator.set_state(state["position"])


def _order(windows: Sequence, seed: int) -> grain.MapDataset:
    """The numbers of windows as they are read: all of them, anew each epoch; of a mixture, its sources by weight."""
    if not isinstance(windows, Mixture):
        return _shuffled(0, len(windows), seed)
    pairs = zip(windows.ends, windows.sources, strict=True)
    orders = [_shuffled(end - len(source), end, seed) for end, source in pairs]
    return grain.MapDataset.mix(orders, windows.weights)


def _shuffled(start: int, stop: int, seed: int) -> grain.MapDataset:
    """As good as endless; grain's own endless length overflows in batches of one."""
    return grain.MapDataset.range(start, stop).seed(seed).shuffle().repeat(2**40 // (stop - start))


@dataclass(frozen=True)
class HeldoutBatches:
    """The same batches each time it is iterated: int32 [B, T + 1]; len() of them.

    Batches are chosen evenly over the whole split, in its order. All have one shape: a last incomplete batch is
    left out, and a split of fewer windows than a batch is one smaller batch.
    """

    windows: Sequence
    batch: int
    limit: int | None

    def __post_init__(self):
        whole("batch", self.batch)
        if self.limit is not None:
            whole("limit", self.limit)

    def __len__(self) -> int:
        available = max(len(self.windows) // self.batch, 1)
        return available if self.limit is None else min(self.limit, available)

    def __iter__(self) -> Iterator[Int32[np.ndarray, "B window"]]:
        rows = min(self.batch, len(self.windows))
        chosen = np.arange(len(self) * rows) * len(self.windows) // (len(self) * rows)
        for indices in chosen.reshape(len(self), rows):
            yield _read(self.windows, indices)


def _read(windows: Sequence, numbers: Int[np.ndarray, " B"]) -> Int32[np.ndarray, "B window"]:
    return np.stack([windows[number] for number in numbers.tolist()])
