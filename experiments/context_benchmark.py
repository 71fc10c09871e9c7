"""What learning while reading costs: ``context.learn`` against the plain training step, and by the period of a level.

    python -m experiments context_benchmark
    python -m experiments context_benchmark --model hope-tiny --periods 64 256

Tokens per second of one stream read in pieces: only read; read and stored by a first level of each period (the model's
slower levels are written too, at theirs); and the training step, with nothing in context and through the writes of that
level. Same tokens per call, all in one process, the best of interleaved repetitions. Appends JSON lines to
``context_benchmark.jsonl`` in ``--results``; minutes on a CPU.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import parse
from experiments.benchmark import Trainer, best_seconds, machine
from experiments.checks import at_least_one, must_divide
from experiments.results import append, open_results
from hope_jax import LanguageModel, ModelConfig, context, model_named
from hope_jax.errors import UserError
from hope_jax.models import with_in_context
from hope_jax.streams import learn


@dataclass(frozen=True)
class ContextBenchmarkConfig:
    """Measure the cost of levels that are written in context."""

    model: str = "hope_attention-tiny"
    """Name of the model."""
    periods: tuple[int, ...] = (16, 64, 256, 1024)
    """Periods of the fastest level in tokens; every one is a row. Each must divide the model's slower periods."""
    tokens: int = 2048
    """Tokens per call; a multiple of every period. Training reads them as sequences of 512."""
    repeats: int = 5
    """Repetitions; the best counts."""
    results: Path = Path("experiments/results")
    """Folder of context_benchmark.jsonl."""

    def __post_init__(self):
        at_least_one(self, "tokens", "repeats")
        if self.tokens % 512:
            raise UserError(f"--tokens must be a multiple of 512, got {self.tokens}.")
        for period in self.periods:
            must_divide("periods", period, "tokens", self.tokens)
            self.written(period)

    def written(self, period: int) -> ModelConfig:
        """The model with one more level, or the same number where that period takes the place of one."""
        return with_in_context(model_named(self.model), (period,))


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    config = parse(ContextBenchmarkConfig, arguments, "context_benchmark")
    path = open_results(config.results, "context_benchmark.jsonl")
    calls = {"training": Trainer(model_named(config.model), config.tokens // 512, 512, None)} | _reading(config)
    for period in config.periods:
        calls |= _with_level(config, period)
    seconds = best_seconds(calls, config.repeats)
    for name, value in seconds.items():
        row = {"model": config.model, "what": name, "tokens": config.tokens}
        row |= {"tokens_per_second": round(config.tokens / value), "ratio": round(seconds["training"] / value, 3)}
        append(path, row | machine())
        print(json.dumps(row), flush=True)
    return 0


def _made(config: ModelConfig, tokens: int) -> tuple[Any, Any, Any]:
    """A model, its parameters and one stream."""
    model, stream = LanguageModel(config), jax.random.randint(jax.random.key(1), (1, tokens), 0, config.vocab_size)
    params = jax.jit(lambda key: model.init(key, stream[:, :1])["params"])(jax.random.key(0))
    return model, params, stream


def _reading(config: ContextBenchmarkConfig) -> dict[str, Callable[[], Any]]:
    """Only reading, with the state carried."""
    model, params, tokens = _made(model_named(config.model), config.tokens)
    read = jax.jit(lambda params, tokens, state: model.apply({"params": params}, tokens, state))
    _, state = read(params, tokens, model.init_state(params, 1, capacity=2 * config.tokens))
    return {"reading": functools.partial(read, params, tokens, state)}


def _with_level(config: ContextBenchmarkConfig, period: int) -> dict[str, Callable[[], Any]]:
    """Storing what is read, and training through the writes, of a level with that period."""
    architecture = config.written(period)
    model, params, tokens = _made(architecture, config.tokens)
    state = context.start(model, params, 1, capacity=2 * config.tokens + 1)
    _, state = context.surprise(model, params, state, jnp.concatenate([tokens[:, :1], tokens], axis=1))
    calls: dict[str, Callable[[], Any]] = {
        f"learning, period {period}": functools.partial(learn, model, params, state, tokens)
    }
    if period < 512:
        calls[f"training through writes, period {period}"] = Trainer(architecture, config.tokens // 512, 512, None)
    return calls
