"""What an optimizer's step costs: time against Muon's, state, compile time, on the parameters of a named model.

    python -m experiments optimizer_benchmark                       # all optimizers on hope-30m
    python -m experiments optimizer_benchmark --model hope-140m --optimizers muon m3

A step is update and application, of random gradients in the shapes of the model. M3 starts a block every 100 steps and
orthogonalises its slow momentum then; both kinds of step are timed, and the mean over a block counts. Times are the
best of ``--repeats`` interleaved repetitions; ratios compare within one run. Each run appends JSON lines to
``optimizer_benchmark.jsonl``. Two minutes on two cores. Expect M3 within 1.3 times Muon.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hope_jax import LanguageModel, model_named
from hope_jax import train as training
from hope_jax.cli.checks import at_least, given, known
from hope_jax.cli.measuring import best_seconds, report
from hope_jax.cli.parse import parse
from hope_jax.cli.results import Row, open_results
from hope_jax.nn.axes import decays, matrices
from hope_jax.optim import M3, OPTIMIZERS

BLOCK = M3().slow_period or 1
"""Steps of M3 between two blocks of its slow momentum."""


@dataclass(frozen=True)
class OptimizerBenchmarkConfig:
    """Measure the steps of optimizers."""

    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)  # Which to measure.
    against: str = "muon"  # Ratios are of this one's time; it is measured too.
    model: str = "hope-30m"  # Name of the model whose parameters are stepped.
    repeats: int = 5  # Repetitions; the best counts.
    results: Path = Path("experiments/results")  # Folder of optimizer_benchmark.jsonl.

    def __post_init__(self):
        given(self, "optimizers")
        for name in (*self.optimizers, self.against):
            known("optimizer", name, OPTIMIZERS)
        at_least(self, 1, "repeats")
        model_named(self.model)


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    config = parse(OptimizerBenchmarkConfig, arguments, "python -m experiments optimizer_benchmark")
    report(open_results(config.results, "optimizer_benchmark.jsonl"), measure(config))
    return 0


class Stepper:
    """One optimizer's compiled step, with a state at the start of a block and one inside it."""

    def __init__(self, tx: optax.GradientTransformation, params: Any):
        def step(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        self.params, self.start = params, jax.jit(tx.init)(params)
        lowered, since = jax.jit(step).lower(params, self.start, params), time.perf_counter()
        self._step = lowered.compile()
        self.compile_seconds = time.perf_counter() - since
        self.inside = self(self.start)[1]

    def __call__(self, state: Any) -> tuple[Any, Any]:
        """Parameters and state after a step from ``state``; the parameters serve as gradients."""
        return self._step(self.params, state, self.params)

    def row(self, seconds_start: float, seconds: float, parameters: int) -> Row:
        """What is known about steps that take so long."""
        mean = (seconds_start + (BLOCK - 1) * seconds) / BLOCK
        times = {"step_ms": 1e3 * mean, "inside_ms": 1e3 * seconds, "start_ms": 1e3 * seconds_start}
        size = {"state_bytes_per_parameter": sum(leaf.nbytes for leaf in jax.tree.leaves(self.start)) / parameters}
        rounded = {name: round(value, 2) for name, value in (times | size).items()}
        return rounded | {"compile_seconds": round(self.compile_seconds, 1)}


def measure(config: OptimizerBenchmarkConfig) -> list[Row]:
    """All optimizers, with the ratio of mean step times to that of ``config.against``."""
    params, axes = random_parameters(config.model), LanguageModel(model_named(config.model)).axes()
    count = training.count_parameters(params)
    names = list(dict.fromkeys((*config.optimizers, config.against)))
    bar = training.progress(names, desc="compiling")
    steppers = {name: Stepper(OPTIMIZERS[name].build(1e-3, matrices(axes), decays(axes)), params) for name in bar}
    calls: dict[str, Callable[[], Any]] = {}
    for name, one in steppers.items():
        calls |= {f"{name} start": functools.partial(one, one.start), name: functools.partial(one, one.inside)}
    seconds = best_seconds(calls, config.repeats)
    rows = {name: one.row(seconds[f"{name} start"], seconds[name], count) for name, one in steppers.items()}
    base = rows[config.against]["step_ms"]
    about = {"model": config.model, "parameters": count, "against": config.against}
    return [{"optimizer": name, **about, **row, "ratio": round(row["step_ms"] / base, 3)} for name, row in rows.items()]


def random_parameters(model: str) -> Any:
    """Normal numbers in the shapes of the model's parameters."""
    shapes = training.abstract_params(LanguageModel(model_named(model)))
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
    return jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape, jnp.float32), shapes)
