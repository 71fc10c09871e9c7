"""Optimizers on a small Vision Transformer: each with its own sweep of learning rates, then three seeds at the best.

    python -m experiments vit_optimizers                             # scikit-learn's digits, nothing to download
    python -m experiments vit_optimizers --mnist ~/mnist --patch 4   # the four idx files of MNIST, packed or not
    python -m experiments vit_optimizers --tfds cifar10 --patch 4 --width 128 --steps 5000

Every optimizer gets as many rates: its usual one times 1/10, 1/3, 1, 3 and 10, warmup and cosine decay, tuned with one
seed by the validation images (a fixed part of the training images). Then it trains with ``--seeds`` at its best rate;
the test images are looked at only there. All who orthogonalise do so with the same parameters, seen as the same
matrices, and with steps of the same size. Seven minutes on one core with the digits; expect 92 to 98% right.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.images import ImageSet, Split, digits, draws, from_tfds, mnist
from experiments.vit import ViT, image_loss, matrices
from hope_jax import optim
from hope_jax import train as training
from hope_jax.cli.checks import at_least, check_seeds, given, known
from hope_jax.cli.parse import parse
from hope_jax.cli.plots import draw_mean, plot
from hope_jax.cli.results import Results, Row, aligned, spread
from hope_jax.errors import UserError
from hope_jax.optim.matrices import dimension_numbers

NEEDED = ("phase", "optimizer", "learning_rate", "seed", "task", "curve", "validation_accuracy", "test_accuracy")
TASK = ("patch", "width", "layers", "heads", "steps", "batch", "warmup", "evaluate_every")
FACTORS = (0.1, 1 / 3, 1.0, 3.0, 10.0)
TUNING_SEED = 1000
FAST, SLOW = optim.MomentumScale(1, 0.95), optim.MomentumScale(20, 0.9)
EVALUATED = 1024
"""Most training images at which the training loss is measured."""
DIVERGED = {"loss": 1e9, "accuracy": 0.0}


class Contestant(NamedTuple):
    """An optimizer by its learning rate, and the rate in the middle of its sweep."""

    make: Callable[[Any], optax.GradientTransformation]
    rate: float


def _muon(rate: Any) -> optax.GradientTransformation:
    """Muon of optax, on the matrices of M3, with the size of M3's steps and its decay."""
    decay: dict[str, Any] = {"weight_decay": 1e-4, "adam_weight_decay": 1e-4}
    numbers = dimension_numbers(matrices)
    return optax.contrib.muon(rate, muon_weight_dimension_numbers=numbers, consistent_rms=0.2, **decay)


# AdaMuon is M3 with the fast momentum alone: orthogonalised, then divided by a second moment.
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

    optimizers: tuple[str, ...] = tuple(CONTESTANTS)  # Who takes part.
    mnist: Path | None = None  # Folder of MNIST's four idx files, instead of the digits.
    tfds: str | None = None  # Name or folder of a TFDS image set, instead of the digits.
    size: int | None = None  # With --tfds: pixels of a side to which all images are resized.
    patch: int = 2  # Pixels of a patch's side; must divide the images.
    width: int = 64  # Features of the model.
    layers: int = 2  # Blocks.
    heads: int = 4  # Attention heads; must divide the width.
    steps: int = 400  # Batches of a run.
    batch: int = 64  # Images per batch.
    warmup: int = 20  # Batches over which the learning rate grows to its peak.
    evaluate_every: int = 25  # Batches between two points of the curves; must divide --steps.
    seeds: tuple[int, ...] = (0, 1, 2)  # Of parameters and batches, at the best learning rate.
    results: Path = Path("experiments/results")  # Folder of vit_optimizers.jsonl and the curves.
    cache: Path = Path("runs/.cache")  # Folder of compiled programs and runs that were stopped.

    def __post_init__(self) -> None:
        for name in self.optimizers:
            known("optimizer", name, CONTESTANTS)
        given(self, "optimizers", "seeds")
        check_seeds(self)
        at_least(self, 1, "patch", "width", "layers", "heads", "steps", "batch", "evaluate_every")
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
        return {"images": images.name, "size": self.size, **{name: getattr(self, name) for name in TASK}}

    def setup(self, name: str, images: ImageSet) -> training.Setup:
        """The model with that optimizer at a learning rate of 1; ``training.at_rate`` sets another."""
        model = ViT(images.classes, self.patch, self.width, self.layers, self.heads)
        peak = optax.warmup_cosine_decay_schedule(0.0, 1.0, self.warmup, self.steps, 0.01)

        def init(key: Any) -> Any:
            return model.init(jax.random.split(key)[0], jnp.asarray(images.train.images[:1]))["params"]

        def rate(count: Any) -> Any:
            return peak(count + 1)

        return training.Setup(init, image_loss(model), CONTESTANTS[name].make(rate), rate).for_any_rate()


def main(arguments: Sequence[str]) -> int:
    """Train, print and draw; returns the exit status."""
    config = parse(VitOptimizersConfig, arguments, "python -m experiments vit_optimizers")
    results = Results(config.results, "vit_optimizers", config.cache, NEEDED)
    images = config.images()
    race(config, images, results)
    rows = [row for row in results.rows() if row["task"] == config.task(images)]
    print("\n".join(table(config, rows)))
    print(f"written: {results.path}, {draw(config, images, rows)}")
    return 0


def race(config: VitOptimizersConfig, images: ImageSet, results: Results) -> None:
    """Each optimizer's sweep, then its seeds at the best rate."""
    training.keep_programs(config.cache)
    for name in config.optimizers:
        setup = config.setup(name, images)

        def run(phase: str, rate: float, seed: int, name: str = name, setup: training.Setup = setup) -> Row:
            about = {"phase": phase, "optimizer": name, "learning_rate": rate, "seed": seed}
            about |= {"task": config.task(images)}
            return results.complete(about, functools.partial(train, config, images, about, setup))

        rate = best([run("sweep", CONTESTANTS[name].rate * factor, TUNING_SEED) for factor in FACTORS])["learning_rate"]
        for seed in config.seeds:
            run("final", rate, seed)


def best(sweep: Sequence[Row]) -> Row:
    """The run with the most right validation images, of several the one with the lowest validation loss."""
    return max(sweep, key=lambda row: (row["validation_accuracy"], -row["validation_loss"]))


def train(config: VitOptimizersConfig, images: ImageSet, about: Row, setup: training.Setup, run: training.Run) -> Row:
    """The last losses and accuracies of a run, and all as curves; those of the test images only at the chosen rate."""
    seed, rate, name = about["seed"], about["learning_rate"], about["optimizer"]
    parts = {"train": [Split(*(x[:EVALUATED] for x in images.train))], "validation": [images.validation]}
    if about["phase"] == "final":
        parts["test"] = [images.test]
    batches, steps = draws(images.train, seed, config.batch), training.Steps(config.steps, config.evaluate_every)
    start, label = training.at_rate(setup.start(seed), rate), f"{name}, {about['phase']}, rate {rate:.2g}, seed {seed}"
    try:
        measured = [*training.fit(setup, batches, parts, steps, start=start, run=run, label=label).heldout.values()]
    except training.Diverged as error:
        measured = [*error.heldout.values(), {f"{part}/{m}": value for part in parts for m, value in DIVERGED.items()}]
    names = [f"{part}/{metric}" for part in ("train", "validation", "test") for metric in DIVERGED]
    curve = {name.replace("/", "_"): [round(x[name], 6) for x in measured[1:] if name in x] for name in names}
    return {name: values[-1] if values else None for name, values in curve.items()} | {"curve": curve}


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
    """Mean and deviation over seeds, and a word where the best rate is at the edge of the sweep."""
    cells: list[Sequence[Any]] = [("optimizer", "rate", "test accuracy", "test loss", "training loss", "seeds", "")]
    for name, runs in finals(config, rows).items():
        rate, middle = runs[0]["learning_rate"], CONTESTANTS[name].rate
        edge = "at the edge of its sweep" if rate in (middle * FACTORS[0], middle * FACTORS[-1]) else ""
        accuracy, test, train = ([row[key] for row in runs] for key in ("test_accuracy", "test_loss", "train_loss"))
        losses = spread(test, ".4f"), spread(train, ".4f")
        cells.append((name, f"{rate:.2g}", spread(accuracy, ".2%"), *losses, len(runs), edge))
    return [line.rstrip() for line in aligned(cells)]


def draw(config: VitOptimizersConfig, images: ImageSet, rows: Sequence[Row]) -> Path:
    """Training loss and test error against steps, means over seeds, seeds thin, as a PNG; its path."""
    steps = range(config.evaluate_every, config.steps + 1, config.evaluate_every)
    path = config.results / f"vit-optimizers-{images.name.replace('/', '-')}.png"
    with plot(path, 2, (11, 4)) as (left, right):
        for name, runs in finals(config, rows).items():
            whole = [row["curve"] for row in runs if len(row["curve"]["test_loss"]) == len(steps)]
            if whole:
                draw_mean(left, steps, [curve["train_loss"] for curve in whole], name)
                draw_mean(right, steps, [[1 - x for x in curve["test_accuracy"]] for curve in whole], name)
        left.set(xlabel="steps", ylabel="training loss", yscale="log", title=images.name)
        right.set(xlabel="steps", ylabel="test error", yscale="log", title=f"{len(config.seeds)} seeds")
    return path
