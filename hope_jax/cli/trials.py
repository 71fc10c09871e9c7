"""Experiments that train several rows at several learning rates with several seeds: their flags, runs and summaries.

A subclass of ``Trials`` adds the flags of its task. Read ``results.py`` next: it keeps what the runs showed.
"""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hope_jax import train as training
from hope_jax.cli.checks import at_least, check_seeds, given
from hope_jax.cli.plots import look
from hope_jax.cli.results import Row, aligned, heading, settings, spread
from hope_jax.config import flatten

Model = tuple[str, int]  # its name, and how many parameters it has
Runs = dict[tuple[Model, float], dict[int, Row]]  # model and learning rate -> seed -> line


@dataclass(frozen=True, kw_only=True)
class Trials:
    """Every combination of a row, a learning rate and a seed is a run."""

    rows: tuple[str, ...] = ()  # What to train, by name.
    learning_rates: tuple[float, ...] = (3e-3,)  # Peak learning rates; the best of them counts.
    seeds: tuple[int, ...] = (0, 1, 2)  # Seeds of parameters and data.
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
        """For each run the beginning of its line (row, rate, seed and optimizer), and the optimizer itself."""
        for row, rate, seed in itertools.product(self.rows, self.learning_rates, self.seeds):
            optimizer = dataclasses.replace(self.optimizer, learning_rate=rate)
            about = {"row": row, "learning_rate": rate, "seed": seed, "batch": self.batch, "most_steps": self.steps}
            yield about | flatten({"optimizer": optimizer}), optimizer

    def fit(self, metric: str, about: Row, *problem: Any, **options: Any) -> Row:
        """Train the run whose line begins with ``about``; returns the rest of the line, ``metric`` included.

        ``problem``: setup, batches and held-out batches. ``options``: more arguments of ``train.fit``.
        """
        since, steps = time.monotonic(), training.Steps(self.steps, self.eval_every)
        found = training.fit(*problem, steps=steps, seed=about["seed"], label=label(about), **options)
        curve = [[step, means[metric]] for step, means in found.heldout.items()]
        size, seconds = training.count_parameters(found.params), round(time.monotonic() - since, 1)
        return {"parameters": size, "steps": found.step, "seconds": seconds, metric: curve[-1][1], "curve": curve}

    def recipe(self) -> Row:
        """The optimizer without its learning rate, as part of a setting."""
        optimizer = flatten({"optimizer": self.optimizer})
        del optimizer["optimizer.learning_rate"]
        return optimizer

    @property
    def at_rate_1(self) -> training.OptimizerConfig:
        """The optimizer of the setups that ``fit_at_rate`` trains."""
        return dataclasses.replace(self.optimizer, learning_rate=1.0)

    def fit_at_rate(
        self, setup: training.Setup, about: Row, batches: Any, heldout: Any, run: training.Run
    ) -> tuple[Any, Mapping[int, Mapping[str, float]]]:
        """Train ``setup``, one of ``at_rate_1`` and ``for_any_rate``, at the rate and with the seed of ``about``.

        Returns the parameters, None if the run diverged, and the held-out means by step.
        """
        start = training.at_rate(setup.start(about["seed"]), about["learning_rate"])
        steps = training.Steps(self.steps, self.eval_every)
        try:
            found = training.fit(setup, batches, heldout, steps, start=start, run=run, label=label(about))
        except training.Diverged as error:
            return None, error.heldout
        return found.params, found.heldout

    def tune(self, names: Sequence[Any], line: Callable[[Any, float, int], Row]) -> None:
        """Run the first seed of each name at all rates, then each other seed of all names at the best rate of each.

        ``line(name, rate, seed)`` does a run, unless it is on file. After each seed all names can be compared.
        """
        first, *others = self.seeds
        swept = {name: [line(name, rate, first) for rate in self.learning_rates] for name in names}
        for seed in others:
            for name in names:
                line(name, min(swept[name], key=_choice)["learning_rate"], seed)


def label(about: Row) -> str:
    """The name of a run while it trains."""
    return f"{named(about)}, rate {about['learning_rate']:g}, seed {about['seed']}"


def _choice(line: Row) -> float:
    return math.inf if line["chosen_by"] is None else line["chosen_by"]


def at_chosen_rate(runs: Runs) -> dict[Model, list[Row]]:
    """For each model its runs at its best rate, that of the least ``chosen_by`` in its sweep.

    The sweep is the runs of the seed that was run at the most rates.
    """
    chosen = {}
    for model in dict.fromkeys(model for model, _ in runs):
        lines = [line for (name, _), of_seed in runs.items() if name == model for line in of_seed.values()]
        seeds = [line["seed"] for line in lines]
        best = min((line for line in lines if line["seed"] == statistics.mode(seeds)), key=_choice)
        chosen[model] = list(runs[model, best["learning_rate"]].values())
    return chosen


def of_models(lines: Sequence[Row]) -> list[tuple[Row, Runs]]:
    """The settings on file with their runs; a run done again replaces the former one."""
    return settings(lines, lambda line: ((named(line), line["parameters"]), line["learning_rate"]))


def tables(lines: Sequence[Row], judged_on: str, cells: Callable[[list[Row]], Row]) -> list[str]:
    """A table for each setting on file, under a heading and what tuning there was.

    ``judged_on``: what chose the learning rates. ``cells``: the columns by name of a model, from its runs at the chosen
    rate.
    """
    said = []
    for setting, runs in of_models(lines):
        rows = [cells(chosen) for chosen in at_chosen_rate(runs).values()]
        columns = [list(rows[0]), *(list(row.values()) for row in rows)]
        said += [heading(setting), _tuning(runs, judged_on), *aligned(columns)]
    return said


def _tuning(runs: Runs, judged_on: str) -> str:
    """A sentence on how the models were tuned."""
    tried = {model[0]: [f"{rate:g}" for name, rate in sorted(runs) if name == model] for model, _ in runs}
    grids = {tuple(rates) for rates in tried.values()}
    if len(grids) > 1:
        return "tuning is not equal yet: " + "; ".join(f"{name} at {', '.join(rates)}" for name, rates in tried.items())
    if len(rates := grids.pop()) == 1:
        return f"no tuning: the learning rate of every row was {rates[0]}"
    return f"equal tuning: each row was tried at rates {', '.join(rates)} with one seed, judged on {judged_on}"


def grouped(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """The rows by ``key``, in the order in which keys first come."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def named(row: Row) -> str:
    """The name of a model in tables and figures."""
    trained = f" at {row['trained']}" if "trained" in row else ""
    return row["row"] + trained + ("" if row.get("writes", True) else " without writes")


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
    """Draw the curve of every run, with one label for each ``named``; controls are dashed, looks follow ``order``."""
    for name, same in grouped(rows, named).items():
        style = look(order.index(same[0]["row"]), control=not same[0].get("writes", True))
        for i, row in enumerate(same):
            points = zip(*row["curve"], strict=True)
            axes.plot(*points, label=None if i else name, linewidth=1, **style)
