"""What an optimizer's step costs: time against Muon's, state, compile time, on the parameters of a named model.

    python -m experiments optimizer_benchmark                       # all optimizers on hope-30m
    python -m experiments optimizer_benchmark --model hope-140m --optimizers muon m3

A step is update and application, of random gradients in the shapes of the model. M3 starts a block every 100 steps and
orthogonalises its slow momentum then; both kinds of step are timed, and the mean over a block counts. Times are the
best of ``--repeats`` interleaved repetitions; ratios compare within one run. Each run appends JSON lines to
``optimizer_benchmark.jsonl``. Two minutes on two cores. Expect M3 within 1.3 times Muon.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hope_jax import LanguageModel, model_named
from hope_jax import train as training
from hope_jax.cli.checks import at_least, given, known
from hope_jax.cli.measuring import best_seconds, report
from hope_jax.cli.optimizer_step import Stepper, random_parameters
from hope_jax.cli.parse import parse
from hope_jax.cli.results import Row, open_results
from hope_jax.nn.axes import decays, matrices
from hope_jax.optim import OPTIMIZERS


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
