"""Experiments that train several rows at several learning rates with several seeds: their flags, runs and summaries.

A subclass of ``Trials`` adds the flags of its task. Read ``results.py`` next: it keeps what the runs showed.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hope_jax import train as training
from hope_jax.cli.checks import at_least, check_seeds, given
from hope_jax.cli.results import Row, spread
from hope_jax.config import flatten


@dataclass(frozen=True, kw_only=True)
class Trials:
    """Every row, learning rate and seed is a run."""

    rows: tuple[str, ...] = ()  # What to train, by name.
    learning_rates: tuple[float, ...] = (3e-3,)  # Peak learning rates; of several the best counts.
    seeds: tuple[int, ...] = (0, 1, 2)  # Of parameters and data.
    steps: int = 2000  # Batches to train on.
    batch: int = 64  # Sequences per batch.
    eval_every: int = 50  # Batches between measurements on held-out batches.
    eval_batches: int = 8  # Held-out batches per measurement, always the same ones.
    results: Path = Path("experiments/results")  # Folder of the results.
    cache: Path = Path("runs/.cache")  # Folder of compiled programs, prepared text and runs that were stopped.
    optimizer: training.OptimizerConfig = field(default_factory=training.OptimizerConfig)
    """Its learning rate is replaced by those above."""

    def __post_init__(self) -> None:
        given(self, "rows", "learning_rates", "seeds")
        check_seeds(self)
        at_least(self, 1, "steps", "batch", "eval_every", "eval_batches")
        for rate in self.learning_rates:
            dataclasses.replace(self.optimizer, learning_rate=rate)

    def runs(self) -> Iterator[tuple[Row, training.OptimizerConfig]]:
        """Row, rate, seed and optimizer of each run as a line of the results begins, and the optimizer itself."""
        for row, rate, seed in itertools.product(self.rows, self.learning_rates, self.seeds):
            optimizer = dataclasses.replace(self.optimizer, learning_rate=rate)
            about = {"row": row, "learning_rate": rate, "seed": seed, "batch": self.batch, "most_steps": self.steps}
            yield about | flatten({"optimizer": optimizer}), optimizer

    def fit(self, metric: str, about: Row, *problem: Any, **options: Any) -> Row:
        """Train the run that ``about`` begins to describe; the rest of its line, with ``metric``.

        ``problem``: setup, batches and held-out batches. ``options``: more arguments of ``train.fit``.
        """
        since, label = time.monotonic(), f"{about['row']}, rate {about['learning_rate']:g}, seed {about['seed']}"
        steps, seed = training.Steps(self.steps, self.eval_every), about["seed"]
        found = training.fit(*problem, steps=steps, seed=seed, label=label, **options)
        curve = [[step, means[metric]] for step, means in found.heldout.items()]
        size, seconds = training.count_parameters(found.params), round(time.monotonic() - since, 1)
        return {"parameters": size, "steps": found.step, "seconds": seconds, metric: curve[-1][1], "curve": curve}


def grouped(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """The rows by ``key``, in the order in which keys first come."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def named(row: Row) -> str:
    """What a run is called in tables and figures."""
    return row["row"] + ("" if row.get("writes", True) else " without writes")


def at_best_rate(rows: Sequence[Row], score: str) -> dict[str, list[Row]]:
    """By ``named``, the runs (one for each seed) of the learning rate whose mean ``score`` is largest."""

    def mean(of_rate: list[Row]) -> float:
        return statistics.mean(row[score] for row in of_rate)

    by_rate = {name: grouped(same, lambda row: row["learning_rate"]) for name, same in grouped(rows, named).items()}
    return {name: max(runs.values(), key=mean) for name, runs in by_rate.items()}


def percent(rows: Sequence[Row], score: str) -> str:
    """Mean and deviation over seeds of a share, with the number of seeds and their learning rate."""
    share = spread([row[score] for row in rows], ".2%")
    return f"{share} ({len(rows)} seeds, rate {rows[0]['learning_rate']:g})"


def draw_curves(axes: Any, rows: Sequence[Row], order: Sequence[str]) -> None:
    """The curve of every run, those of one ``named`` under one label; controls are dashed, colours follow ``order``."""
    for name, same in grouped(rows, named).items():
        colour, style = f"C{order.index(same[0]['row']) % 10}", "-" if same[0].get("writes", True) else "--"
        for i, row in enumerate(same):
            points = zip(*row["curve"], strict=True)
            axes.plot(*points, style, color=colour, label=None if i else name, linewidth=1)
