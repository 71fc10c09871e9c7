"""Multi-query associative recall: only a memory that stores can answer, and its control with writes off cannot.

    python -m experiments recall                          # rows hope, titans, deltanet: 64 tokens, 4 pairs
    python -m experiments recall --no-writes              # the same models with the inner learning rate at 0
    python -m experiments recall --length 128 --pairs 8 --rows hope --learning-rates 3e-3 --seeds 0

A sequence shows pairs of key and value and later asks for the value of each key (``data.tasks``). Every batch is
new, so nothing can be learned by heart. A model that holds no pair can at best name one of the values it saw: about
1 / pairs, less if it misses those too. A run ends at 99.5% or after ``--steps``; over several learning rates the best
counts. Each run appends a JSON line to ``recall.jsonl`` in ``--results``, from which the curves are drawn, so runs can
be split over processes. Expect 99% and more with writes and no more than about 1 / pairs without.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

from hope_jax import LanguageModel, ModelConfig
from hope_jax import train as training
from hope_jax.cli.checks import at_least_one, known
from hope_jax.cli.parse import parse
from hope_jax.cli.results import Row, append, deviation, open_results
from hope_jax.cli.running import keep_programs, progress_interval
from hope_jax.data import IGNORE, mqar
from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.models import ARCHITECTURES, Size
from hope_jax.train.optimizer import OptimizerConfig
from hope_jax.train.step import LossFn

HELDOUT_SEED = 1_000_003
SOLVED = 0.995
TASK = ("length", "pairs", "vocab", "anywhere", "width", "layers", "heads")
"""Fields of a JSON line that must agree before two runs are drawn side by side."""
NEEDED = (*TASK, "row", "writes", "curve")


@dataclass(frozen=True)
class RecallConfig:
    """Train small models from scratch on associative recall."""

    rows: tuple[str, ...] = ("hope", "titans", "deltanet")
    """Architectures, as in the model names before the size."""
    writes: bool = True
    """Off: the control, the same models with the inner learning rate at 0."""
    length: int = 64
    """Tokens per sequence, even and at least 4 x pairs."""
    pairs: int = 4
    """Keys and values to remember per sequence."""
    vocab: int = 256
    """Token ids; half of them are keys, half values. The literature uses 8192."""
    anywhere: bool = False
    """Ask uniformly over the sequence instead of mostly soon after the pairs."""
    width: int = 64
    """Model features."""
    layers: int = 2
    """Blocks."""
    heads: int = 2
    """Heads of the mixers; must divide the width."""
    steps: int = 2000
    """Most batches to train on."""
    batch: int = 64
    """Sequences per batch."""
    learning_rates: tuple[float, ...] = (3e-3,)
    """Peak learning rates; every one is a run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of parameters and data; every one is a run."""
    eval_every: int = 50
    """Batches between measurements."""
    eval_batches: int = 8
    """Fresh batches per measurement."""
    results: Path = Path("experiments/results")
    """Folder of recall.jsonl and the curves."""
    cache: Path = Path("runs/.cache")
    """Folder of compiled programs."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(warmup=100))
    """Its learning rate is replaced by those above."""

    def __post_init__(self):
        if not (self.rows and self.seeds and self.learning_rates):
            raise UserError("Give at least one of each: --rows, --seeds, --learning-rates.")
        at_least_one(self, "steps", "batch", "eval_every", "eval_batches", "width", "layers", "heads")
        for row in self.rows:
            self.model(row)
        for rate in self.learning_rates:
            dataclasses.replace(self.optimizer, learning_rate=rate)
        for seed in self.seeds:
            mqar(seed, 0, 1, self.length, self.pairs, self.vocab)

    def model(self, row: str) -> ModelConfig:
        """The architecture of that name in the size of this task. Raises UserError if there is none."""
        known("architecture", row, ARCHITECTURES)
        # One level that learns at every batch, as everybody's feed-forward part does: the mixers are compared here.
        size = Size(self.width, self.layers, self.heads, self.vocab, self.length, (Level(1),))
        config = ARCHITECTURES[row](size)
        return config if self.writes else without_writes(config)


def without_writes(config: ModelConfig) -> ModelConfig:
    """The same model, parameters included, whose memories never write: the inner learning rate is 0.

    Retention goes on: Hope's memories then fade from their learned start, at first by 1/horizon per token.
    """
    if not hasattr(config.mixer, "rate_max"):
        raise UserError(f"{type(config.mixer).__name__} has no inner learning rate; only memories can stop writing.")
    return dataclasses.replace(config, mixer=dataclasses.replace(config.mixer, rate_max=0.0))  # pyright: ignore


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    config = parse(RecallConfig, arguments, "python -m experiments recall")
    rows = recall(config)
    print("\n".join(summary(rows)))
    print(f"written: {config.results / 'recall.jsonl'}, {draw(config)}")
    return 0


def recall(config: RecallConfig) -> list[Row]:
    """Every run of ``config``, one after another; each is on disk when it ends."""
    path, rows = open_results(config.results, "recall.jsonl"), []
    training.read_rows(path, NEEDED)  # a damaged line is better known now than after training
    keep_programs(config.cache)
    for row in config.rows:
        for rate in config.learning_rates:
            for seed in config.seeds:
                rows.append(run(config, row, rate, seed))
                append(path, rows[-1])
    return rows


def run(config: RecallConfig, row: str, learning_rate: float, seed: int) -> Row:
    """Train one model until it solves the task, diverges or has had its batches; the JSON line about it."""
    optimizer = dataclasses.replace(config.optimizer, learning_rate=learning_rate)
    architecture = config.model(row)
    tx = training.optimizer(optimizer, config.steps, architecture.update_every(config.batch * config.length))
    loss = recall_loss(model := LanguageModel(architecture))
    step = training.train_step(loss, tx, training.schedule(optimizer, config.steps))
    evaluate = training.evaluator(loss, [batch(config, HELDOUT_SEED, i) for i in range(config.eval_batches)])
    state = jax.jit(functools.partial(training.init_state, model, tx))(jax.random.key(seed))
    parameters, since = training.count_parameters(state.params), time.monotonic()
    named = f"{row}{'' if config.writes else ' without writes'}, rate {learning_rate:g}, seed {seed}"
    curve = list(_curve(config, state, step, evaluate, seed, named))
    task = {name: getattr(config, name) for name in TASK}
    return {
        **{"row": row, "writes": config.writes, **task, "batch": config.batch, "seed": seed},
        **{"learning_rate": learning_rate, "parameters": parameters, "steps": curve[-1][0], "accuracy": curve[-1][1]},
        **{"seconds": round(time.monotonic() - since, 1), "curve": curve},
    }


def _curve(
    config: RecallConfig, state: Any, step: Callable, evaluate: Callable, seed: int, named: str
) -> Iterable[tuple[int, float]]:
    """Held-out accuracy after so many steps, as it is measured while training."""
    with tqdm(total=config.steps, desc=named, unit="step", dynamic_ncols=True, mininterval=progress_interval()) as bar:
        for done in range(1, config.steps + 1):
            state, metrics = step(state, batch(config, seed, done - 1))
            bar.update(1)
            if done % config.eval_every and done < config.steps:
                continue
            means = evaluate(state.params)
            bar.set_postfix_str(f"loss {float(metrics['loss'].value):.3f}, accuracy {means['accuracy']:.1%}")
            yield done, means["accuracy"]
            if means["accuracy"] >= SOLVED or not math.isfinite(means["loss"]):
                return


def batch(config: RecallConfig, seed: int, index: int) -> np.ndarray:
    """Batch number ``index``: inputs and targets side by side, int32 [B, 2 T]."""
    power = 1.0 if config.anywhere else 0.01
    return np.concatenate(mqar(seed, index, config.batch, config.length, config.pairs, config.vocab, power), axis=1)


def recall_loss(model: LanguageModel) -> LossFn:
    """Mean cross-entropy in nats and accuracy over the positions that ask for a value."""

    def loss(params: Any, batch: Any) -> tuple[Any, Any]:
        inputs, targets = jnp.split(batch, 2, axis=1)
        logits, _ = model.apply({"params": params}, inputs)  # pyright: ignore[reportAssignmentType]
        asked = targets != IGNORE
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(asked, targets, 0))
        count = asked.sum().astype(jnp.float32)
        total, right = jnp.sum(nats * asked), jnp.sum(asked & (logits.argmax(-1) == targets)).astype(jnp.float32)
        return total / count, {"loss": training.Mean(total, count), "accuracy": training.Mean(right, count)}

    return loss


def summary(rows: Sequence[Row]) -> list[str]:
    """Per model: accuracy at the best learning rate, mean and spread over seeds."""
    lines = []
    for name in dict.fromkeys(map(_named, rows)):
        of_rate: dict[float, list[float]] = {}
        for row in rows:
            if _named(row) == name:
                of_rate.setdefault(row["learning_rate"], []).append(row["accuracy"])
        rate, best = max(of_rate.items(), key=lambda item: statistics.mean(item[1]))
        mean, spread = statistics.mean(best), deviation(best)
        lines.append(f"{name:<28} {mean:7.2%} +- {spread:.2%} ({len(best)} seeds, rate {rate:g})")
    return lines


def _named(row: Row) -> str:
    return row["row"] + ("" if row["writes"] else " without writes")


def same_task(config: RecallConfig, rows: Sequence[Row]) -> list[Row]:
    """Those of ``rows`` that had this task at this size of model."""
    return [row for row in rows if all(row[name] == getattr(config, name) for name in TASK)]


def draw(config: RecallConfig) -> Path:
    """Accuracy against steps of every run on file with this task, controls dashed, as a PNG; its path."""
    same = same_task(config, training.read_rows(config.results / "recall.jsonl", NEEDED))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, colours = figure.subplots(), {name: f"C{i % 10}" for i, name in enumerate(ARCHITECTURES)}
    title = f"{config.length} tokens, {config.pairs} pairs, vocabulary {config.vocab}, width {config.width}"
    seen = set()
    for row in same:
        label = None if _named(row) in seen else _named(row)
        seen.add(_named(row))
        style = "-" if row["writes"] else "--"
        axes.plot(*zip(*row["curve"], strict=True), style, color=colours[row["row"]], label=label, linewidth=1)
    axes.axhline(1 / config.pairs, color="black", linewidth=0.8, linestyle=":", label="one of the values seen")
    axes.set(xlabel="steps", ylabel="accuracy", ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path := config.results / f"recall-{config.length}-{config.pairs}.png", dpi=120)
    return path
