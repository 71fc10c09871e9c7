"""Optimizers on a small Vision Transformer: each with its own sweep of learning rates, then three seeds at the best.

    python -m experiments vit_optimizers                             # scikit-learn's digits, nothing to download
    python -m experiments vit_optimizers --mnist ~/mnist --patch 4   # the four idx files of MNIST, packed or not
    python -m experiments vit_optimizers --tfds cifar10 --patch 4 --width 128 --steps 5000

Every optimizer gets as many rates: its usual one times 1/10, 1/3, 1, 3 and 10, warmup and cosine decay, tuned with one
seed by the validation images (a fixed part of the training images). Then it trains with ``--seeds`` at its best rate;
the test images are looked at only there. Runs append JSON lines to ``vit_optimizers.jsonl`` in ``--results``; what is
on file with the same settings is not run again, so a stopped experiment goes on. Table and curves come from the file.
AdaMuon is ``m3`` with the fast momentum alone: orthogonalised, then divided by a second moment. All who orthogonalise
do so with the same parameters, seen as the same matrices, and with steps of the same size.

Seven minutes on one core with the digits. Expect 92 to 98% right, most with orthogonalised momenta.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

from experiments.images import ImageSet, Split, digits, from_tfds, mnist
from experiments.vit import ViT, matrices
from hope_jax import optim
from hope_jax import train as training
from hope_jax.cli.checks import at_least_one, known
from hope_jax.cli.parse import parse
from hope_jax.cli.results import Row, append, deviation, open_results
from hope_jax.cli.running import progress_interval
from hope_jax.errors import UserError
from hope_jax.optim.matrices import dimension_numbers

NEEDED = ("phase", "optimizer", "learning_rate", "seed", "task", "curve", "validation_accuracy", "test_accuracy")
FACTORS = (0.1, 1 / 3, 1.0, 3.0, 10.0)
TUNING_SEED = 1000
FAST, SLOW = optim.MomentumScale(1, 0.95), optim.MomentumScale(20, 0.9)
EVALUATED = 1024
"""Most training images at which the training loss is measured."""


@dataclass(frozen=True)
class Contestant:
    """An optimizer by its learning rate, and the rate in the middle of its sweep."""

    make: Callable[[Any], optax.GradientTransformation]
    rate: float


def _muon(rate: Any) -> optax.GradientTransformation:
    """optax's, on the matrices of M3, with the size of M3's steps and its decay."""
    return optax.contrib.muon(
        rate,
        weight_decay=1e-4,
        adam_weight_decay=1e-4,
        muon_weight_dimension_numbers=dimension_numbers(matrices),
        consistent_rms=0.2,
    )


CONTESTANTS = {
    "adamw": Contestant(lambda rate: optax.adamw(rate, weight_decay=1e-4), 3e-3),
    "muon": Contestant(_muon, 1e-2),
    "adamuon": Contestant(lambda rate: optim.m3(rate, (FAST,), matrices=matrices, weight_decay=1e-4), 1e-2),
    "m3": Contestant(lambda rate: optim.m3(rate, (FAST, SLOW), matrices=matrices, weight_decay=1e-4), 1e-2),
    "sgd_momentum": Contestant(lambda rate: optax.sgd(rate, momentum=0.9), 1e-1),
    "delta_momentum": Contestant(lambda rate: optim.delta_momentum(rate, matrices=matrices), 1e-1),
    "dmgd": Contestant(lambda rate: optim.dmgd(rate, memory="mlp", matrices=matrices), 3e-1),
}


@dataclass(frozen=True)
class VitOptimizersConfig:
    """Train a small ViT with every optimizer."""

    optimizers: tuple[str, ...] = tuple(CONTESTANTS)
    """Who takes part."""
    mnist: Path | None = None
    """Folder of MNIST's four idx files, instead of the digits."""
    tfds: str | None = None
    """Name or folder of a TFDS image set, instead of the digits."""
    size: int | None = None
    """With --tfds: pixels of a side to which all images are resized."""
    patch: int = 2
    """Pixels of a patch's side; must divide the images."""
    width: int = 64
    """Features of the model."""
    layers: int = 2
    """Blocks."""
    heads: int = 4
    """Attention heads; must divide the width."""
    steps: int = 400
    """Batches of a run."""
    batch: int = 64
    """Images per batch."""
    warmup: int = 20
    """Batches over which the learning rate grows to its peak."""
    evaluate_every: int = 25
    """Batches between two points of the curves; must divide --steps."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of parameters and batches, at the best learning rate."""
    results: Path = Path("experiments/results")
    """Folder of vit_optimizers.jsonl and the curves."""

    def __post_init__(self):
        for name in self.optimizers:
            known("optimizer", name, CONTESTANTS)
        if not (self.optimizers and self.seeds):
            raise UserError("Give at least one of each: --optimizers, --seeds.")
        at_least_one(self, "patch", "width", "layers", "heads", "steps", "batch", "evaluate_every")
        if self.steps % self.evaluate_every or not 0 <= self.warmup < self.steps:
            raise UserError(f"--steps {self.steps} must be a multiple of --evaluate-every and more than --warmup.")
        if self.width % self.heads:
            raise UserError(f"--heads must divide --width, got {self.heads} for {self.width}.")
        if (self.mnist and self.tfds) or (self.size is not None and (self.tfds is None or self.size < 1)):
            raise UserError("Give --mnist or --tfds or neither; --size, at least 1, goes with --tfds.")

    def images(self) -> ImageSet:
        """The images to train on. Raises UserError where they cannot be had or the patches do not fit."""
        found = mnist(self.mnist) if self.mnist else from_tfds(self.tfds, self.size) if self.tfds else digits()
        height, width = found.train.images.shape[1:3]
        if height % self.patch or width % self.patch:
            raise UserError(f"--patch must divide the images, got {self.patch} for {height} x {width} pixels.")
        if self.batch > len(found.train.labels):
            raise UserError(f"--batch is {self.batch}; {found.name} has {len(found.train.labels)} training images.")
        return found

    def task(self, images: ImageSet) -> Row:
        """What must agree before two runs are compared."""
        names = ("patch", "width", "layers", "heads", "steps", "batch", "warmup", "evaluate_every")
        return {"images": images.name, "size": self.size, **{name: getattr(self, name) for name in names}}


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    config = parse(VitOptimizersConfig, arguments, "python -m experiments vit_optimizers")
    path = open_results(config.results, "vit_optimizers.jsonl")
    training.read_rows(path, NEEDED)  # a damaged line is better known now than after training
    images = config.images()
    for row in race(config, images, training.read_rows(path, NEEDED)):
        append(path, row)
    rows = [row for row in training.read_rows(path, NEEDED) if row["task"] == config.task(images)]
    print("\n".join(table(config, rows)))
    print(f"written: {path}, {draw(config, images, rows)}")
    return 0


def race(config: VitOptimizersConfig, images: ImageSet, done: Sequence[Row]) -> Iterator[Row]:
    """The runs that are not among ``done``: each optimizer's sweep, then its seeds at the best rate."""
    task = config.task(images)
    done = [row for row in done if row["task"] == task]
    with tqdm(config.optimizers, unit="optimizer", dynamic_ncols=True, mininterval=progress_interval()) as bar:
        for name in bar:
            mine = [row for row in done if row["optimizer"] == name]
            sweep = [row for row in mine if row["phase"] == "sweep"]
            bar.set_description(f"{name}, learning rates")
            rates = [CONTESTANTS[name].rate * factor for factor in FACTORS]
            missing = [rate for rate in rates if rate not in {row["learning_rate"] for row in sweep}]
            new = _rows(config, images, name, missing, [TUNING_SEED] * len(missing), "sweep") if missing else []
            yield from new
            rate = best([*sweep, *new])["learning_rate"]
            finals = {row["seed"] for row in mine if row["phase"] == "final" and row["learning_rate"] == rate}
            bar.set_description(f"{name}, seeds at rate {rate:.2g}")
            if seeds := [seed for seed in config.seeds if seed not in finals]:
                yield from _rows(config, images, name, [rate] * len(seeds), seeds, "final")


def best(sweep: Sequence[Row]) -> Row:
    """The run with the most right validation images, of several the one with the lowest validation loss."""
    return max(sweep, key=lambda row: (row["validation_accuracy"], -row["validation_loss"]))


def _rows(config: VitOptimizersConfig, images: ImageSet, name: str, rates: list, seeds: list, phase: str) -> list[Row]:
    curves = jax.device_get(train(config, images, CONTESTANTS[name].make, jnp.array(rates), jnp.array(seeds)))
    rows = []
    for i, (rate, seed) in enumerate(zip(rates, seeds, strict=True)):
        curve = {key: _plain(value[i]) for key, value in curves.items()}
        if phase == "sweep":  # the test images are for the chosen rate alone
            curve |= {key: [] for key in curve if key.startswith("test")}
        about = {"phase": phase, "optimizer": name, "learning_rate": rate, "seed": seed, "task": config.task(images)}
        last = {key: value[-1] if value else None for key, value in curve.items()}
        rows.append({**about, **last, "curve": curve})
    return rows


def _plain(values: np.ndarray) -> list[float]:
    """For JSON: a loss that is no number counts as one that is very large."""
    return [round(float(value), 6) if math.isfinite(value) else 1e9 for value in values]


def train(config: VitOptimizersConfig, images: ImageSet, make: Callable, rates: Any, seeds: Any) -> dict[str, Any]:
    """Curves [run, point] of losses and accuracies of runs that differ in rate and seed, all in one program."""
    model = ViT(images.classes, config.patch, config.width, config.layers, config.heads)
    data, validation, test = (jax.tree.map(jnp.asarray, part) for part in images[1:4])
    seen = Split(*(x[:EVALUATED] for x in data))
    peak = optax.warmup_cosine_decay_schedule(0.0, 1.0, config.warmup, config.steps, 0.01)

    def loss(params: Any, part: Split) -> tuple[Any, Any]:
        logits: Any = model.apply({"params": params}, part.images)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, part.labels)
        return jnp.mean(nats), jnp.mean(logits.argmax(-1) == part.labels)

    def run(rate: Any, seed: Any) -> dict[str, Any]:
        start, draws = jax.random.split(jax.random.key(seed))
        params = model.init(start, data.images[:1])["params"]
        tx = make(lambda count: rate * peak(count + 1))

        def step(carry: Any, number: Any) -> tuple[Any, None]:
            params, state = carry
            picked = jax.random.choice(jax.random.fold_in(draws, number), len(data.labels), (config.batch,))
            gradients, _ = jax.grad(loss, has_aux=True)(params, Split(*(x[picked] for x in data)))
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        def interval(carry: Any, numbers: Any) -> tuple[Any, dict[str, Any]]:
            carry, _ = jax.lax.scan(step, carry, numbers)
            measured = {"train": seen, "validation": validation, "test": test}
            pairs = {name: loss(carry[0], part) for name, part in measured.items()}
            losses = {f"{name}_loss": pair[0] for name, pair in pairs.items()}
            return carry, losses | {f"{name}_accuracy": pair[1] for name, pair in pairs.items()}

        numbers = jnp.arange(config.steps).reshape(-1, config.evaluate_every)
        return jax.lax.scan(interval, (params, tx.init(params)), numbers)[1]

    return jax.jit(jax.vmap(run))(rates, seeds)


def finals(config: VitOptimizersConfig, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Per optimizer its runs with the seeds of ``config`` at its best rate."""
    found = {}
    for name in config.optimizers:
        mine = [row for row in rows if row["optimizer"] == name]
        rate = best([row for row in mine if row["phase"] == "sweep"])["learning_rate"]
        chosen = [row for row in mine if row["phase"] == "final" and row["learning_rate"] == rate]
        found[name] = [row for row in chosen if row["seed"] in config.seeds]
    return found


def table(config: VitOptimizersConfig, rows: Sequence[Row]) -> list[str]:
    """Mean and standard deviation over seeds, and a word where the best rate is at the edge of the sweep."""
    lines = [f"{'optimizer':<16} {'rate':>8} {'test accuracy':>18} {'test loss':>18} {'training loss':>18}  seeds"]
    for name, runs in finals(config, rows).items():
        columns = [
            _spread([row[key] for row in runs], percent)
            for key, percent in (("test_accuracy", True), ("test_loss", False), ("train_loss", False))
        ]
        rate = runs[0]["learning_rate"]
        middle = CONTESTANTS[name].rate
        edge = "  at the edge of its sweep" if rate in (middle * FACTORS[0], middle * FACTORS[-1]) else ""
        lines.append(f"{name:<16} {rate:>8.2g} {columns[0]:>18} {columns[1]:>18} {columns[2]:>18}  {len(runs)}{edge}")
    return lines


def _spread(values: Sequence[float], percent: bool) -> str:
    mean, spread = statistics.mean(values), deviation(values)
    return f"{mean:.2%} +- {spread:.2%}" if percent else f"{mean:.4f} +- {spread:.4f}"


def draw(config: VitOptimizersConfig, images: ImageSet, rows: Sequence[Row]) -> Path:
    """Training loss and test error against steps, mean and band of one deviation over seeds, as a PNG; its path."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    steps = np.arange(1, config.steps // config.evaluate_every + 1) * config.evaluate_every
    for i, (name, runs) in enumerate(finals(config, rows).items()):
        losses = np.array([row["curve"]["train_loss"] for row in runs])
        errors = 1 - np.array([row["curve"]["test_accuracy"] for row in runs])
        for ax, values in zip(axes, (losses, errors), strict=True):
            mean, spread = values.mean(0), values.std(0, ddof=min(1, len(values) - 1))
            ax.plot(steps, mean, color=f"C{i}", label=name, linewidth=1.2)
            ax.fill_between(steps, np.maximum(mean - spread, 1e-6), mean + spread, color=f"C{i}", alpha=0.15)
    axes[0].set(xlabel="steps", ylabel="training loss", yscale="log", title=images.name)
    axes[1].set(xlabel="steps", ylabel="test error", yscale="log", title=f"{len(config.seeds)} seeds")
    axes[1].legend(fontsize="small")
    for ax in axes:
        ax.grid(alpha=0.3, which="both")
    figure.savefig(path := config.results / f"vit-optimizers-{images.name.replace('/', '-')}.png", dpi=120)
    return path
