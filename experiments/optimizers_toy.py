"""Deep optimizers on two toy problems: a winding valley, and tasks one after another (Eq. 45, 53; SPEC 5.7).

    python -m experiments optimizers_toy                       # every optimizer, momentum decays 0.9, 0.95, 0.99
    python -m experiments optimizers_toy --optimizers momentum delta_gram --decays 0.9

*Valley*: steps until psi < 1e-4, the best of 54 settings: 9 learning rates times 6 values of the optimizer's other
number (the erase of delta momentum, the inner rate of a deep memory, and, where there is none, a factor on the learning
rate, so that everybody has 54). *Tasks*: four orthogonal regression tasks in sequence, 60 examples each; the loss on
the first right after it and after the last, at learning rate 0.02 and the middle value of the other number, and the
mean loss on all four at the end, for the best of the same 54 settings. All in float64, all settings at once.

Half a minute on one core. Expect at decay 0.9: momentum 283 steps, delta momentum 74 (gram, its default) and 200
(scalar). Momentum at its best learning rates is chaotic: of the nine without a factor it needs 391, 281 and 1010 steps
(decay 0.9, 0.95, 0.99) with the learning rate inside the sum, as Eq. 33 has it, but 453, 333 and 820 with the rate
outside, as optax has it; but for rounding the two are one.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.toy_problems import AMPLITUDE, FREQUENCY, START, K, Make, descend, height, learn, stream
from hope_jax import optim
from hope_jax.cli.checks import at_least, given, known
from hope_jax.cli.parse import parse
from hope_jax.cli.plots import plot
from hope_jax.cli.results import Results, Row, aligned
from hope_jax.errors import UserError
from hope_jax.train import progress

TOLERANCE = 1e-4
"""The height below which the valley is solved."""
NEEDED = ("problem", "task", "optimizer", "decay", "learning_rate", "other")
RATES = tuple(n * 1e-3 for n in (1, 2, 3, 5, 7, 10, 15, 20, 30))
FACTORS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
ERASES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
INNER = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
STREAM_RATE = 0.02


@dataclass(frozen=True)
class Contestant:
    """An optimizer of three numbers: ``make(learning rate, other number, momentum decay)``.

    ``other``: what the other number is; ``values``: those it is tried at; ``usual``: that of the tasks' fixed setting.
    """

    make: Any
    other: str
    values: tuple[float, ...]
    usual: float

    def at(self, decay: float) -> Make:
        """The optimizer by learning rate and other number."""
        return functools.partial(self.make, decay=decay)

    def grid(self) -> tuple[Any, Any]:
        """Learning rate and other number of every setting."""
        rates, others = zip(*itertools.product(RATES, self.values), strict=True)
        return jnp.asarray(rates, float), jnp.asarray(others, float)


def _m3(rate: Any, decay: float) -> optax.GradientTransformation:
    return optim.m3(rate, (optim.MomentumScale(1, decay), optim.MomentumScale(100, decay)), matrices=lambda _: "matrix")


def _delta(form: Any) -> Contestant:
    return Contestant(lambda rate, erase, decay: optim.delta_momentum(rate, decay, erase, form), "erase", ERASES, 0.1)


def _scaled(make: Any) -> Contestant:
    return Contestant(lambda rate, factor, decay: make(rate * factor, decay), "factor", FACTORS, 1.0)


def _mlp(rate: Any, inner: Any, decay: float) -> optax.GradientTransformation:
    return optim.dmgd(rate, optim.MLPMemory(hidden=16), decay, inner)


CONTESTANTS = {
    "sgd": _scaled(lambda rate, decay: optax.sgd(rate)),
    "momentum": _scaled(lambda rate, decay: optax.sgd(rate, momentum=decay)),
    "adam": _scaled(lambda rate, decay: optax.adam(rate, b1=decay)),
    "delta_scalar": _delta("scalar"),
    "delta_gram": _delta("gram"),
    "dmgd_linear": _scaled(lambda rate, decay: optim.dmgd(rate, "linear", decay)),
    "dmgd_mlp": Contestant(_mlp, "inner rate", INNER, 0.1),
    "m3": _scaled(_m3),
}


@dataclass(frozen=True)
class OptimizersToyConfig:
    """Tune every optimizer on two toy problems, with as many settings for each."""

    optimizers: tuple[str, ...] = tuple(CONTESTANTS)  # Who takes part.
    decays: tuple[float, ...] = (0.9, 0.95, 0.99)  # Momentum decays, each a row of its own.
    steps: int = 2000  # Most steps in the valley.
    seeds: int = 20  # Streams of tasks to average over.
    tasks: int = 4  # Tasks in a stream.
    task_steps: int = 60  # Examples of each task.
    size: int = 16  # Weights of the regression, at least one per task.
    results: Path = Path("experiments/results")  # Folder of optimizers_toy.jsonl and the picture.
    cache: Path = Path("runs/.cache")  # Folder of the run in progress.

    def __post_init__(self) -> None:
        for name in self.optimizers:
            known("optimizer", name, CONTESTANTS)
        given(self, "optimizers", "decays")
        if not all(0 <= decay < 1 for decay in self.decays):
            raise UserError(f"--decays must be 0 or more and below 1, got {self.decays}.")
        at_least(self, 1, "steps", "seeds", "tasks", "task_steps")
        if self.size < self.tasks:
            raise UserError(f"--size must be at least --tasks, got {self.size} for {self.tasks}: tasks are orthogonal.")

    @property
    def task(self) -> dict[str, list[float]]:
        """What must agree before two rows of a problem are compared."""
        valley = [K, AMPLITUDE, FREQUENCY, TOLERANCE, self.steps]
        return {"valley": valley, "tasks": [self.seeds, self.tasks, self.task_steps, self.size]}


def main(arguments: Sequence[str]) -> int:
    """Run, print and draw; returns the exit status."""
    config = parse(OptimizersToyConfig, arguments, "python -m experiments optimizers_toy")
    results = Results(config.results, "optimizers_toy", config.cache, NEEDED)
    with jax.enable_x64(True):
        race(config, results)
        print("\n".join(table(config, results.rows())))
        print(f"written: {results.path}, {draw(config, results.rows())}")
    return 0


def race(config: OptimizersToyConfig, results: Results) -> None:
    """Every optimizer at every decay, valley and tasks in turn."""
    fields = list(itertools.product(config.optimizers, config.decays))
    with progress(fields, unit="optimizer") as bar:
        for name, decay in bar:
            bar.set_description(f"{name}, decay {decay:g}")
            for problem, work in PROBLEMS.items():
                about = {"problem": problem, "task": config.task[problem], "optimizer": name, "decay": decay}
                results.complete(about, functools.partial(work, config, name, decay))


def valley(config: OptimizersToyConfig, name: str, decay: float, run: Any = None) -> Row:
    """Steps to the tolerance and the best setting (None: no setting gets there), and how many settings got there."""
    contestant = CONTESTANTS[name]
    rates, others = contestant.grid()
    below = np.asarray(height(descend(contestant.at(decay), rates, others, config.steps)) < TOLERANCE)
    first = np.where(below.any(1), below.argmax(1) + 1, config.steps + 1)
    best, solved = int(first.argmin()), int(below.any(1).sum())
    setting = {"steps": int(first[best]), "learning_rate": float(rates[best]), "value": float(others[best])}
    found = setting if solved else dict.fromkeys(setting)
    return {"solved": solved, "settings": len(first), "other": contestant.other, **found}


def in_sequence(config: OptimizersToyConfig, name: str, decay: float, run: Any = None) -> Row:
    """Losses of the task stream, means over seeds: at the fixed setting and, all tasks at the end, at the best."""
    contestant = CONTESTANTS[name]
    rates, others = contestant.grid()
    tasks = stream(config.seeds, config.tasks, config.task_steps, config.size)
    means = np.asarray(learn(tasks, contestant.at(decay), rates, others)).mean(1)
    fixed = int(np.argmin(abs(np.asarray(rates) - STREAM_RATE) + abs(np.asarray(others) - contestant.usual)))
    last = np.nan_to_num(means[:, -1].mean(-1), nan=np.inf)
    best = int(last.argmin())
    losses = {"first_then": float(means[fixed, 0, 0]), "first_at_end": float(means[fixed, -1, 0])}
    setting = {"learning_rate": float(rates[best]), "value": float(others[best]), "other": contestant.other}
    return {**losses, "all_at_end": float(last[best]), "settings": len(last), **setting}


PROBLEMS = {"valley": valley, "tasks": in_sequence}


def latest(config: OptimizersToyConfig, rows: Sequence[Row]) -> dict[tuple[str, str, float], Row]:
    """The last row of each problem, optimizer and decay that had this task, in the order of ``CONTESTANTS``."""
    same = {(r["problem"], r["optimizer"], r["decay"]): r for r in rows if r["task"] == config.task[r["problem"]]}
    order = list(CONTESTANTS)
    return dict(sorted(same.items(), key=lambda item: (item[0][2], order.index(item[0][1]))))


def table(config: OptimizersToyConfig, rows: Sequence[Row]) -> list[str]:
    """What is on file about these problems, as text."""
    said = [f"steps to psi < {TOLERANCE:g}, best of 54 settings; loss of task 1 then and at the end at the fixed"]
    said += ["setting; mean loss of all tasks at the end, best of 54", ""]
    found = latest(config, rows)
    cells: list[Sequence[Any]] = [("decay", "optimizer", "steps", "solved", "at", "task 1", "at end", "all")]
    for (problem, name, decay), row in found.items():
        if problem == "valley":
            setting = f"{row['learning_rate']:g}, {row['other']} {row['value']:g}" if row["steps"] else "-"
            steps, solved = row["steps"] or f">{config.steps}", f"{row['solved']}/{row['settings']}"
            other = found.get(("tasks", name, decay), {})
            losses = [f"{other[n]:.2g}" if other else "-" for n in ("first_then", "first_at_end", "all_at_end")]
            cells.append((f"{decay:g}", name, steps, solved, setting, *losses))
    return said + aligned(cells)


def draw(config: OptimizersToyConfig, rows: Sequence[Row]) -> Path:
    """The way of each optimizer through the valley at the smallest of ``--decays``, at its best setting, as a PNG."""
    decay = min(config.decays)
    r, theta = np.meshgrid(np.linspace(-4.5, 2, 200), np.linspace(-4.5, 3, 200))
    heights = np.log10(np.asarray(height(jnp.stack([r, theta], -1))) + 1e-6)
    with plot(path := config.results / "optimizers_toy.png", 2, (11, 4.5)) as (left, right):
        left.contourf(r, theta, heights, levels=30, cmap="Greys", alpha=0.6)
        for (problem, name, of), row in latest(config, rows).items():
            if problem == "valley" and of == decay and row["steps"]:
                _draw_way(left, right, name, row)
        title = f"way to the minimum, decay {decay:g}"
        left.set(xlabel="r", ylabel="theta", xlim=(-4.5, 2), ylim=(-4.5, 3), title=title)
        right.axhline(TOLERANCE, color="black", linewidth=0.8, linestyle=":")
        right.set(xlabel="steps", ylabel="psi", yscale="log", xscale="log", title="best setting of each")
    return path


def _draw_way(left: Any, right: Any, name: str, row: Row) -> None:
    colour = f"C{list(CONTESTANTS).index(name)}"
    rate, other = (jnp.asarray([row[key]], float) for key in ("learning_rate", "value"))
    points = descend(CONTESTANTS[name].at(row["decay"]), rate, other, row["steps"])[0]
    way = np.concatenate([np.array([START]), np.asarray(points)])
    left.plot(way[:, 0], way[:, 1], ".-", color=colour, linewidth=0.8, markersize=2)
    right.plot(np.asarray(height(jnp.asarray(way))), color=colour, label=f"{name}: {row['steps']}")
