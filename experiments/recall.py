"""Multi-query associative recall: only a memory that stores can answer, and its control with writes off cannot.

    python -m experiments recall                          # rows hope, titans, deltanet: 64 tokens, 4 pairs
    python -m experiments recall --no-writes              # the same models with the inner learning rate at 0
    python -m experiments recall --length 128 --pairs 8 --rows hope --learning-rates 3e-3 --seeds 0

A sequence shows pairs of key and value and later asks for the value of each key. A model that holds no pair can at best
name one of the values it saw: about 1 / pairs. A run ends at 99.5% or after ``--steps``. Expect 99%, without writes
about 1 / pairs.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from experiments.compare import MODELS_VERSION
from hope_jax import LanguageModel, ModelConfig
from hope_jax import train as training
from hope_jax.cli.checks import at_least
from hope_jax.cli.parse import parse
from hope_jax.cli.plots import plot
from hope_jax.cli.results import Results, Row
from hope_jax.cli.trials import Trials, at_best_rate, draw_curves, percent
from hope_jax.data import IGNORE, mqar
from hope_jax.levels import Level
from hope_jax.models import ARCHITECTURES, Size, row_named, without_writes

HELDOUT_SEED, SOLVED = 1_000_003, 0.995
TASK = ("length", "pairs", "vocab", "anywhere", "width", "layers", "heads")  # equal in runs that are drawn together


@dataclass(frozen=True, kw_only=True)
class RecallConfig(Trials):
    """Train small models from scratch on associative recall."""

    rows: tuple[str, ...] = ("hope", "titans", "deltanet")  # Architectures, as in model names before the size.
    writes: bool = True  # Off: the control, the same models with the inner learning rate at 0.
    length: int = 64  # Tokens per sequence, even and at least 4 x pairs.
    pairs: int = 4  # Keys and values to remember per sequence.
    vocab: int = 256  # Token ids; half of them are keys, half values. The literature uses 8192.
    anywhere: bool = False  # Ask uniformly over the sequence instead of mostly soon after the pairs.
    width: int = 64  # Model features.
    layers: int = 2  # Blocks.
    heads: int = 2  # Heads of the mixers; must divide the width.
    optimizer: training.OptimizerConfig = field(default_factory=lambda: training.OptimizerConfig(warmup=100))

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "width", "layers", "heads")
        for row in self.rows:
            training.answer_loss(LanguageModel(self.model(row)), IGNORE)
        self.examples(min(self.seeds), 0)

    def model(self, row: str) -> ModelConfig:
        """The architecture of that name; a single level, which learns at every batch: the mixers are compared."""
        model = row_named(row)(Size(self.width, self.layers, self.heads, self.vocab, self.length, (Level(1),)))
        return model if self.writes else without_writes(model)

    def examples(self, seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Batch number ``index``: inputs and targets [B, T]."""
        return mqar(seed, index, self.batch, self.length, self.pairs, self.vocab, 1.0 if self.anywhere else 0.01)


def main(arguments: Sequence[str]) -> int:
    """Train, print and draw; returns the exit status."""
    config = parse(RecallConfig, arguments, "python -m experiments recall")
    results = Results(config.results, "recall", config.cache, (*TASK, "row", "writes", "curve"))
    for name, rows in at_best_rate(recall(config, results), "accuracy").items():
        print(f"{name:<28} {percent(rows, 'accuracy')}")
    print(f"written: {results.path}, {draw(config, results.rows())}")
    return 0


def recall(config: RecallConfig, results: Results) -> list[Row]:
    """The lines of all runs of ``config``."""
    task = {name: getattr(config, name) for name in (*TASK, "writes")} | {"models": MODELS_VERSION}
    return [results.complete(one[0] | task, functools.partial(train, config, *one)) for one in config.runs()]


def train(config: RecallConfig, about: Row, optimizer: training.OptimizerConfig, run: training.Run) -> Row:
    """Train one model until it solves the task or has had its batches; what its line says."""
    model, tokens = LanguageModel(config.model(about["row"])), config.batch * config.length
    setup = training.model_setup(model, training.answer_loss(model, IGNORE), optimizer, config.steps, tokens)
    batches = training.ComputedBatches(functools.partial(config.examples, about["seed"]))
    heldout = [config.examples(HELDOUT_SEED, index) for index in range(config.eval_batches)]
    return config.fit("accuracy", about, setup, batches, heldout, run=run, until=lambda now: now["accuracy"] >= SOLVED)


def draw(config: RecallConfig, rows: Sequence[Row]) -> Path:
    """Accuracy against steps of the ``rows`` with this task, controls dashed, as a PNG; its path."""
    new = [row for row in rows if row.get("models") == MODELS_VERSION]
    same = [row for row in new if all(row[name] == getattr(config, name) for name in TASK)]
    with plot(path := config.results / f"recall-{config.length}-{config.pairs}.png") as axes:
        draw_curves(axes, same, [*ARCHITECTURES, *sorted({row["row"] for row in same} - set(ARCHITECTURES))])
        axes.axhline(1 / config.pairs, color="black", linewidth=0.8, linestyle=":", label="one of the values seen")
        title = f"{config.length} tokens, {config.pairs} pairs, vocabulary {config.vocab}, width {config.width}"
        axes.set(xlabel="steps", ylabel="accuracy", ylim=(0, 1.02), title=title)
    return path
