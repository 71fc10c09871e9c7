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

from hope_jax import LanguageModel, ModelConfig, model_named
from hope_jax import train as training
from hope_jax.cli.checks import at_least_one
from hope_jax.cli.parse import parse
from hope_jax.cli.results import Row, append, deviation, open_results
from hope_jax.cli.running import keep_programs, progress_interval
from hope_jax.config import flatten
from hope_jax.data import DataConfig, make_tokenizer, open_text
from hope_jax.errors import UserError
from hope_jax.models import without_writes
from hope_jax.train.optimizer import OptimizerConfig

FILE = "compare.jsonl"
CONTROL = "_without_writes"
IDENTITY = ("text", "fingerprint", "row", "size", "parameters", "length", "batch", "steps", "eval_batches")
"""Fields of a JSON line that must agree, as the optimizer's must, before two runs are seeds of the same thing."""
NEEDED = (*IDENTITY, "seed", "step", "tokens", "bits_per_byte")


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
        at_least_one(self, "steps", "batch", "length", "eval_every", "eval_batches")
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
    config = parse(CompareConfig, arguments, "python -m experiments compare")
    if config.table and not (config.results / FILE).exists():
        raise UserError(f"There is no {config.results / FILE}; compare something first or name another --results.")
    path = open_results(config.results, FILE)
    training.read_rows(path, NEEDED)  # a damaged line is better known before hours of training than after
    if not config.table:
        compare(config)
    print("\n".join(table(training.read_rows(path, NEEDED))))
    print(f"written: {path}, {draw(config)}")
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
    model = LanguageModel(architecture)
    tx = training.optimizer(config.optimizer, config.steps, architecture.update_every(tokens_per_step), model.axes())
    loss = training.next_token_loss(model, tokenizer.byte_lengths)
    step = training.train_step(loss, tx, training.schedule(config.optimizer, config.steps))
    evaluate = training.evaluator(loss, data.heldout_batches(batch=config.batch, limit=config.eval_batches))
    batches = data.train_batches(batch=config.batch, seed=seed)
    state = jax.jit(functools.partial(training.init_state, model, tx))(jax.random.key(seed))
    about = {name: getattr(config, name) for name in ("size", "length", "batch", "steps", "eval_batches")}
    about |= {"text": config.name, "row": row, "seed": seed, **flatten({"optimizer": config.optimizer})}
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


def key(row: Row) -> tuple[Any, ...]:
    """What a JSON line is about: equal for the seeds of one model, on one text, with one optimizer."""
    return (*(row[name] for name in IDENTITY), *_settings(row, sorted(filter(_is_setting, row))))


def _is_setting(name: str) -> bool:
    return name.startswith("optimizer.")


def _differing(rows: Sequence[Row], shown: Sequence[str]) -> list[str]:
    """Names beyond those ``shown`` in which ``rows`` differ as of ``key``; parameters only within one model."""
    settings = {name: None for row in rows for name in row if _is_setting(name)}
    hidden = [name for name in (*IDENTITY, *settings) if name not in (*shown, "parameters")]
    models = {(row["row"], row["size"]) for row in rows}
    counted = {(row["row"], row["size"], row["parameters"]) for row in rows}
    differing = [name for name in hidden if len({row.get(name) for row in rows}) > 1]
    return differing + ["parameters"] * (len(counted) > len(models))


def _settings(row: Row, names: Sequence[str]) -> list[str]:
    return [f"{name.removeprefix('optimizer.').removeprefix('method.')}={row.get(name)}" for name in names]


def table(rows: Sequence[Row]) -> list[str]:
    """Held-out bits per byte at the end, mean and standard deviation over seeds, one line per ``key``."""
    final: dict[tuple, dict[int, Row]] = {}
    for row in rows:
        if row["step"] == row["steps"]:  # a run done again replaces the former one
            final.setdefault(key(row), {})[row["seed"]] = row
    names = _differing(rows, ("text", "fingerprint", "row", "size", "length", "optimizer.learning_rate"))
    lines = [
        f"{'text':<10} {'content':<8} {'row':<22} {'size':<5} {'length':>6} {'tokens':>10} {'rate':>8} "
        f"{'bits per byte':>13} {'+-':>6} seeds"
    ]
    for of_seed in (final[each] for each in sorted(final)):
        row, bits = next(iter(of_seed.values())), [row["bits_per_byte"] for row in of_seed.values()]
        line = (
            f"{row['text']:<10} {row['fingerprint'][:8]:<8} {row['row']:<22} {row['size']:<5} {row['length']:>6} "
            f"{row['tokens']:>10,} {row['optimizer.learning_rate']:>8.1e} "
            f"{statistics.mean(bits):>13.4f} {deviation(bits):>6.4f} {len(bits)}"
        )
        lines.append(" ".join([line, *_settings(row, names)]))
    return lines


def draw(config: CompareConfig) -> Path:
    """Held-out bits per byte against tokens of this text and length: the mean of each ``key``, seeds thin; a PNG."""
    on_file = training.read_rows(config.results / FILE, NEEDED)
    rows = [row for row in on_file if (row["text"], row["length"]) == (config.name, config.length) and row["step"]]
    names = _differing(rows, ("row",))
    curves: dict[tuple, dict[int, dict[int, float]]] = {}
    for row in rows:
        label = (row["row"], *_settings(row, names))
        curves.setdefault(label, {}).setdefault(row["seed"], {})[row["tokens"]] = row["bits_per_byte"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    colours: dict[tuple, str] = {}  # a control has its model's colour, dashed
    for (name, *settings), of_seed in curves.items():
        colour = colours.setdefault((name.removesuffix(CONTROL), *settings), f"C{len(colours) % 10}")
        style = "--" if name.endswith(CONTROL) else "-"
        for curve in of_seed.values():
            axes.plot(*zip(*sorted(curve.items()), strict=True), style, color=colour, linewidth=0.5, alpha=0.5)
        shared = sorted(set.intersection(*(set(curve) for curve in of_seed.values())))
        means = [statistics.mean(curve[tokens] for curve in of_seed.values()) for tokens in shared]
        axes.plot(shared, means, style, color=colour, label=" ".join([name, *settings]))
    axes.set(xlabel="tokens", ylabel="held-out bits per byte", title=f"{config.name}, {config.length} tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small") if curves else None
    figure.savefig(path := config.results / f"compare-{config.name}-{config.length}.png", dpi=120)
    return path
