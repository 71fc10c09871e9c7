"""Language models at equal parameters, tokens and settings: what the memory is worth on text, and what it is not.

    python -m experiments compare --data.path books/*.txt --steps 600          # every row, three seeds
    python -m experiments compare --rows hope --seeds 0 --name prose ...       # one process of many
    python -m experiments compare --table                                      # means and spreads of all that was run

The rows: ``hope``; ``hope_without_writes``, the same with the inner learning rate at 0; ``transformer_pp``; and
``transformer_conv``, the Transformer with Hope's short convolutions, without which a gain says nothing about memory.
All see the same batches of the same text with the same optimizer, through the training code of ``pretrain``. Every
measurement on held-out text appends a JSON line to ``compare.jsonl`` in ``--results``, from which the learning curves
are drawn. Without --data.path the text is the Python standard library. A run of the defaults takes minutes on a CPU.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from tqdm import tqdm

from experiments import parse
from experiments.recall import Row, append, keep_programs, open_results, progress_interval, without_writes
from hope_jax import LanguageModel, ModelConfig, model_named
from hope_jax import train as training
from hope_jax.data import DataConfig, make_tokenizer, open_text
from hope_jax.errors import UserError
from hope_jax.models import ARCHITECTURES
from hope_jax.train.optimizer import OptimizerConfig

FILE = "compare.jsonl"
CONTROL = "_without_writes"
IDENTITY = ("text", "row", "size", "length", "batch", "steps", "learning_rate")


@dataclass(frozen=True)
class CompareConfig:
    """Train several models on the same text and compare them on held-out text."""

    rows: tuple[str, ...] = ("hope", "hope_without_writes", "transformer_pp", "transformer_conv")
    """Architectures; the ending _without_writes switches the writes of a memory off."""
    size: str = "tiny"
    """Size of all models."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of parameters and order of the text; every one is a run."""
    name: str = "text"
    """What to call the text in the results."""
    steps: int = 600
    """Batches to train on."""
    batch: int = 4
    """Sequences per batch."""
    length: int = 512
    """Tokens per sequence."""
    eval_every: int = 100
    """Batches between measurements on held-out text."""
    eval_batches: int = 16
    """Batches of held-out text per measurement, always the same ones."""
    table: bool = False
    """Train nothing: print mean and standard deviation over seeds of everything on file."""
    results: Path = Path("experiments/results")
    """Folder of compare.jsonl and the curves."""
    cache: Path = Path("runs/.cache")
    """Folder of prepared text and compiled programs."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self):
        for name in ("steps", "batch", "length", "eval_every", "eval_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")
        if Path(self.name).name != self.name:
            raise UserError(f"--name {self.name!r} becomes part of a file name; give a plain word.")
        if not (self.rows and self.seeds):
            raise UserError("Give at least one of each: --rows, --seeds.")
        for row in self.rows:
            self.model(row)

    def model(self, row: str) -> ModelConfig:
        """The model of that row. Raises UserError if there is none."""
        config = model_named(f"{row.removesuffix(CONTROL)}-{self.size}")
        return without_writes(config) if row.endswith(CONTROL) else config


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    config = parse(CompareConfig, arguments, "compare")
    if not config.table:
        compare(config)
    print("\n".join(table(training.read_rows(config.results / FILE))))
    print(f"written: {config.results / FILE}, {draw(config)}")
    return 0


def compare(config: CompareConfig) -> None:
    """Every run of ``config``, seed by seed so that an early look already compares all rows."""
    path = open_results(config.results, FILE)
    keep_programs(config.cache)
    tokenizer = make_tokenizer(config.data)
    data = open_text(config.data, tokenizer, length=config.length, cache_dir=config.cache / "data")
    for seed in config.seeds:
        for row in config.rows:
            run(config, row, seed, tokenizer, data, path)


def run(config: CompareConfig, row: str, seed: int, tokenizer: Any, data: Any, path: Path) -> None:
    """Train one model and append what held-out text gave. Raises UserError if the loss is no longer finite."""
    architecture = dataclasses.replace(config.model(row), vocab_size=tokenizer.vocab_size)
    tokens_per_step = config.batch * config.length
    tx = training.optimizer(config.optimizer, config.steps, architecture.update_every(tokens_per_step))
    loss = training.next_token_loss(model := LanguageModel(architecture), tokenizer.byte_lengths)
    step = training.train_step(loss, tx, training.schedule(config.optimizer, config.steps))
    evaluate = training.evaluator(loss, data.heldout_batches(batch=config.batch, limit=config.eval_batches))
    batches = data.train_batches(batch=config.batch, seed=seed)
    state = jax.jit(functools.partial(training.init_state, model, tx))(jax.random.key(seed))
    about = {name: getattr(config, name) for name in ("size", "length", "batch", "steps")}
    about |= {"text": config.name, "row": row, "seed": seed, "learning_rate": config.optimizer.learning_rate}
    about |= {"parameters": training.count_parameters(state.params), "fingerprint": data.fingerprint}
    interval, since = progress_interval(), time.monotonic()
    with tqdm(total=config.steps, desc=f"{row}, seed {seed}", unit="step", mininterval=interval) as bar:
        for done in range(config.steps + 1):
            if done % config.eval_every == 0 or done == config.steps:
                bits = evaluate(state.params)["bits_per_byte"]
                _check(bits, row, seed, done)
                passed = {"step": done, "tokens": done * tokens_per_step, "seconds": round(time.monotonic() - since, 1)}
                append(path, about | passed | {"bits_per_byte": bits})
                bar.set_postfix_str(f"held-out {bits:.3f} bits/byte")
            if done < config.steps:
                state, _ = step(state, next(batches))
                bar.update(1)


def _check(bits: float, row: str, seed: int, done: int) -> None:
    if not math.isfinite(bits):
        raise training.Diverged(
            f"{row} with seed {seed} diverged by step {done}; compare with a lower --optimizer.learning-rate."
        )


def table(rows: Sequence[Row]) -> list[str]:
    """Held-out bits per byte at the end, mean and standard deviation over seeds, one line per text and model."""
    final: dict[tuple, dict[int, float]] = {}
    for row in rows:
        if row["step"] == row["steps"]:  # a run done again replaces the former one
            final.setdefault(tuple(row[name] for name in IDENTITY), {})[row["seed"]] = row["bits_per_byte"]
    lines = [f"{'text':<10} {'row':<22} {'length':>6} {'tokens':>10} {'bits per byte':>13} {'+-':>6} seeds"]
    for (text, name, _, length, batch, steps, _), of_seed in sorted(final.items()):
        mean = statistics.mean(of_seed.values())
        spread = statistics.stdev(of_seed.values()) if len(of_seed) > 1 else math.nan
        tokens = length * batch * steps
        lines.append(f"{text:<10} {name:<22} {length:>6} {tokens:>10,} {mean:>13.4f} {spread:>6.4f} {len(of_seed)}")
    return lines


def draw(config: CompareConfig) -> Path:
    """Held-out bits per byte against tokens of this text and length: the mean of each row, its seeds thin; a PNG."""
    curves: dict[str, dict[int, dict[int, float]]] = {}
    for row in training.read_rows(config.results / FILE):
        if (row["text"], row["length"]) == (config.name, config.length) and row["step"]:
            curves.setdefault(row["row"], {}).setdefault(row["seed"], {})[row["tokens"]] = row["bits_per_byte"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, of_seed in curves.items():
        style = "--" if name.endswith(CONTROL) else "-"
        colour = f"C{list(ARCHITECTURES).index(name.removesuffix(CONTROL)) % 10}"
        for curve in of_seed.values():
            axes.plot(*zip(*sorted(curve.items()), strict=True), style, color=colour, linewidth=0.5, alpha=0.5)
        shared = sorted(set.intersection(*(set(curve) for curve in of_seed.values())))
        means = [statistics.mean(curve[tokens] for curve in of_seed.values()) for tokens in shared]
        axes.plot(shared, means, style, color=colour, label=name)
    axes.set(xlabel="tokens", ylabel="held-out bits per byte", title=f"{config.name}, {config.length} tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small") if curves else None
    figure.savefig(path := config.results / f"compare-{config.name}-{config.length}.png", dpi=120)
    return path
