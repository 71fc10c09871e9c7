"""What learning while reading costs: ``context.learn`` against the plain training step, and by the period of a level.

    python -m experiments context_benchmark
    python -m experiments context_benchmark --model hope-tiny --length 512 --batch 4 --periods 16 64 256

Tokens per second of streams read in windows of ``--length``, as ``learn`` reads a document: only read; read and stored
by a first level of each period (the model's slower levels gather too, and are written after more than one window); and
the training step over sequences of the same length, with nothing in context and through the writes of that level. All
in one process, the best of interleaved repetitions. Appends JSON lines to ``context_benchmark.jsonl`` in ``--results``;
minutes on a CPU.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from hope_jax import LanguageModel, ModelConfig, context, model_named
from hope_jax import train as training
from hope_jax.cli.benchmark import Trainer
from hope_jax.cli.checks import at_least, given, must_divide
from hope_jax.cli.measuring import best_seconds, report
from hope_jax.cli.parse import parse
from hope_jax.cli.results import Row, open_results
from hope_jax.models import with_in_context


@dataclass(frozen=True)
class ContextBenchmarkConfig:
    """Measure the cost of levels that are written in context."""

    model: str = "hope_attention-tiny"  # Name of the model.
    periods: tuple[int, ...] = (16, 64, 256, 1024)
    """Periods of the fastest level in tokens; every one is a row. Each must divide the model's slower periods."""
    length: int = 1024  # Tokens of a window and of a training sequence; a multiple of every period.
    batch: int = 2  # Sequences per training step.
    devices: int = 1  # Devices that share a training step; on a CPU, cores. One stream cannot be shared.
    streams: int = 1  # Streams that are read side by side, by one call each ``--length`` tokens.
    repeats: int = 5  # Repetitions; the best counts.
    results: Path = Path("experiments/results")  # Folder of context_benchmark.jsonl.

    def __post_init__(self):
        at_least(self, 1, "length", "batch", "devices", "streams", "repeats")
        given(self, "periods")
        must_divide("devices", self.devices, "batch", self.batch)
        for period in self.periods:
            must_divide("periods", period, "length", self.length)
            self.written(period)

    def written(self, period: int) -> ModelConfig:
        """The model with one more level, or the same number where that period takes the place of one."""
        return with_in_context(model_named(self.model), (period,))


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    config = parse(ContextBenchmarkConfig, arguments, "python -m experiments context_benchmark")
    path = open_results(config.results, "context_benchmark.jsonl")
    training.split_host(config.devices)
    report(path, measure(config))
    return 0


def measure(config: ContextBenchmarkConfig) -> Iterator[Row]:
    """What is measured with its tokens per second, and those of training as the measure of the others."""
    calls: dict[str, Callable[[], Any]] = {"training": _trainer(config, model_named(config.model))}
    calls["reading"] = _reading(config)
    for period in config.periods:
        calls[f"learning, period {period}"] = _learning(config, period)
        if period < config.length:
            calls[f"training through writes, period {period}"] = _trainer(config, config.written(period))
    seconds = best_seconds(calls, config.repeats)
    sequences = {name: config.batch if name.startswith("training") else config.streams for name in calls}
    speed = {name: sequences[name] * config.length / seconds[name] for name in calls}
    about = {name: getattr(config, name) for name in ("model", "length", "batch", "devices", "streams")}
    for name, value in speed.items():
        ratio = round(value / speed["training"], 3)
        yield about | {"what": name, "tokens_per_second": round(value), "ratio": ratio}


def _trainer(config: ContextBenchmarkConfig, architecture: ModelConfig) -> Trainer:
    return Trainer(architecture, config.batch, config.length, None, config.devices)


def _streams(config: ContextBenchmarkConfig, architecture: ModelConfig) -> tuple[Any, Any, Any]:
    """A model, its parameters and a window of each stream."""
    model, shape = LanguageModel(architecture), (config.streams, config.length)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, architecture.vocab_size)
    params = jax.jit(lambda key: model.init(key, tokens[:, :1])["params"])(jax.random.key(0))
    return model, params, tokens


def _reading(config: ContextBenchmarkConfig) -> Callable[[], Any]:
    """Only reading."""
    model, params, tokens = _streams(config, model_named(config.model))
    read = jax.jit(lambda params, tokens, state: model.apply({"params": params}, tokens, state))
    return functools.partial(read, params, tokens, model.init_state(params, config.streams, config.length))


def _learning(config: ContextBenchmarkConfig, period: int) -> Callable[[], Any]:
    """Storing what is read. One token was read before, so that every chunk of the window is complete."""
    model, params, tokens = _streams(config, config.written(period))
    state = context.start(model, params, config.streams, capacity=config.length + 1)
    _, state = context.surprise(model, params, state, tokens[:, :1])
    return functools.partial(context.surprise, model, params, state, tokens)
