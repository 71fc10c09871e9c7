"""Two domains in sequence: what is forgotten of the first, for 0 to 3 slow levels and for simply learning less.

    python -m experiments domains --second.path books/*.txt       # Python's standard library, then prose; three seeds
    python -m experiments domains --table                         # means and deviations of all that was run

A model learns ``--steps`` batches of one text, then as many of another and none of the first. Held-out text of both is
measured all along. The rows, with equal parameters:

* ``levels_K``: the MLP of each block is cut into K + 1, of which one moves every batch and the others every 4, 16 and
  64 batches (``--every``). ``levels_0`` has the MLPs of a plain Transformer.
* ``together_K``: the same cut, but all move every batch: what the cut alone is worth.
* ``later_K``: ``together_K`` on the first text, ``levels_K`` on the second: slow levels that have learned the first.

Who learns nothing forgets nothing, so every row learns the second text from the same state at several learning rates,
and column "more" says how much more it forgets than ``levels_0`` does where that one has learned the second text as
well: on the line between two of its rates, which flatters the others. Each text begins with a new optimizer and a
warmup; then the rate is constant. Each run appends a JSON line to ``domains.jsonl`` in ``--results``, from which the
table and the plot are made. An hour on one core; expect that slower levels forget no less than learning less does.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
from hope_jax.cli.results import Row, append, open_results, settings, spread
from hope_jax.cli.running import keep_programs, progress_interval
from hope_jax.config import flatten
from hope_jax.data import DataConfig, make_tokenizer, open_text
from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.models import ARCHITECTURES, Size
from hope_jax.nn.feed_forward.cms import CMSConfig
from hope_jax.optim.by_level import STATIC, level_labels
from hope_jax.train.optimizer import OptimizerConfig

FILE = "domains.jsonl"
KINDS = {"levels": (True, True), "together": (False, False), "later": (False, True)}
"""Kind of row -> whether its slow levels keep their periods on the first text, and on the second."""
SHOWN = ("first_before", "first", "forgotten", "second")
"""Bits per byte in a JSON line: of the first text at the switch and at the end, their difference; the second text."""
NEEDED = ("row", "second_rate", "seed", "setting", "curve", *SHOWN)
VARIED = ("rows", "second_rates", "seeds", "table", "results", "cache", "first", "second")
"""Flags that may differ between runs that are compared; the fingerprints of the texts may not."""


@dataclass(frozen=True)
class DomainsConfig:
    """Learn one text, then another, and measure what is left of the first."""

    rows: tuple[str, ...] = ("levels_0", "levels_1", "levels_2", "levels_3", "together_3", "later_3")
    """levels_K, together_K or later_K with K slow levels."""
    every: tuple[int, ...] = (4, 16, 64)
    """Batches between two updates of the slow levels, ascending."""
    second_rates: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03)
    """Learning rates on the second text, as multiples of --optimizer.learning-rate; every one is a run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of parameters and order of the texts; every one is a run."""
    architecture: str = "hope_attention"
    """An architecture with a continuum memory system."""
    width: int = 96
    """Model features."""
    layers: int = 2
    """Blocks."""
    heads: int = 4
    """Heads of the mixers; must divide the width."""
    steps: int = 448
    """Batches of each text."""
    batch: int = 2
    """Sequences per batch."""
    length: int = 256
    """Tokens per sequence."""
    eval_every: int = 128
    """Batches between measurements on held-out text."""
    eval_batches: int = 24
    """Batches of held-out text of each domain per measurement, always the same ones."""
    table: bool = False
    """Train nothing: print means and deviations over seeds of everything on file."""
    results: Path = Path("experiments/results")
    """Folder of domains.jsonl and the plot."""
    cache: Path = Path("runs/.cache")
    """Folder of prepared text and compiled programs."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(final_fraction=1.0))
    """Anew for each text; with a final fraction below 1 the learning rate falls in each."""
    first: DataConfig = field(default_factory=DataConfig)
    second: DataConfig = field(default_factory=DataConfig)
    """The text that is learned after the first; there is no default."""

    def __post_init__(self):
        at_least_one(self, "width", "layers", "heads", "steps", "batch", "length", "eval_every", "eval_batches")
        if not (self.rows and self.seeds and self.second_rates and min(self.second_rates) > 0):
            raise UserError("Give at least one of each: --rows, --seeds, --second-rates, the last greater than 0.")
        if list(self.every) != sorted(set(self.every)) or not all(n > 1 and self.steps % n == 0 for n in self.every):
            raise UserError(f"--every must ascend from 2 and divide --steps, got {self.every} for {self.steps}.")
        if self.first.tokenizer != self.second.tokenizer:
            raise UserError("--first.tokenizer and --second.tokenizer must be the same: one model reads both texts.")
        for row in self.rows:
            self.model(self.parts(row)[1])

    def parts(self, row: str) -> tuple[str, int]:
        """Kind and number of slow levels of a row. Raises UserError if there is no such row."""
        rows = [f"{kind}_{slow}" for kind in KINDS for slow in range(len(self.every) + 1)]
        known(f"row of --every {self.every}", row, rows)
        kind, slow = row.split("_")
        return kind, int(slow)

    def model(self, slow: int, vocab: int = 256) -> ModelConfig:
        """The model whose MLPs are cut into ``slow`` + 1 levels. Raises UserError if it has no such MLPs."""
        known("architecture", self.architecture, ARCHITECTURES)
        size = Size(self.width, self.layers, self.heads, vocab, self.length, (Level(1),))
        config = ARCHITECTURES[self.architecture](size)
        if not isinstance(whole := config.feed_forward, CMSConfig):
            raise UserError(f"{self.architecture} has no continuum memory system; take hope or hope_attention.")
        levels = tuple(Level(self.batch * self.length * batches) for batches in (1, *self.every[:slow]))
        cut = dataclasses.replace(whole, levels=levels, hidden=max(1, round(whole.hidden / len(levels))))
        return dataclasses.replace(config, feed_forward=cut)

    def setting(self, texts: Sequence[Any]) -> Row:
        """What must agree before two runs are compared."""
        about = {name: value for name, value in flatten(self).items() if name.split(".")[0] not in VARIED}
        return about | {"first": texts[0].fingerprint, "second": texts[1].fingerprint}


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    config = parse(DomainsConfig, arguments, "python -m experiments domains")
    before = training.read_rows(config.results / FILE, NEEDED)  # a damaged line is better known now than after training
    if config.table and not before:
        raise UserError(f"There is nothing in {config.results / FILE}; run something or name another --results.")
    if not (config.table or config.second.path or config.second.tfds):
        raise UserError("The second text has no default; give files of prose, such as --second.path books/*.txt.")
    path = open_results(config.results, FILE)
    for line in () if config.table else domains(config):
        append(path, line)
    print("\n".join(table(lines := training.read_rows(path, NEEDED))))
    print(f"written: {path}, {draw(config, lines)}")
    return 0


def domains(config: DomainsConfig) -> Iterator[Row]:
    """The JSON lines of all runs, seed by seed so that an early look already compares all rows."""
    keep_programs(config.cache)
    tokenizer, cache = make_tokenizer(config.first), config.cache / "data"
    texts = [open_text(x, tokenizer, length=config.length, cache_dir=cache) for x in (config.first, config.second)]
    learners = {slow: Learner(config, slow, tokenizer, texts) for _, slow in map(config.parts, config.rows)}
    for seed in config.seeds:
        learned: dict[tuple[int, bool], Phase] = {}  # rows that learn the first text alike learn it once
        for row in config.rows:
            kind, slow = config.parts(row)
            learner, (periods, later), said = learners[slow], KINDS[kind], f"{row}, seed {seed}"
            if (alike := (slow, periods and slow > 0)) not in learned:
                learned[alike] = learner.learn(learner.start(seed), 0, seed, periods, 1.0, f"{said}, first")
            for rate in config.second_rates:
                second = learner.learn(learned[alike], 1, seed, later, rate, f"{said}, second at {rate:g}")
                about = {"row": row, "second_rate": rate, "seed": seed, "setting": config.setting(texts)}
                yield about | learner.line(learned[alike], second)


class Phase(NamedTuple):
    """Parameters; [batches, bits per byte of the first text, of the second] from the beginning on."""

    params: Any
    curve: list[list[float]]


class Learner:
    """The models with ``slow`` slow levels: programs that all their rows, rates and seeds share."""

    def __init__(self, config: DomainsConfig, slow: int, tokenizer: Any, texts: Sequence[Any]):
        architecture = config.model(slow, tokenizer.vocab_size)
        self._config, self._texts, self._model = config, texts, LanguageModel(architecture)
        self._every = architecture.update_every(config.batch * config.length)
        loss = training.next_token_loss(self._model, tokenizer.byte_lengths)
        heldout = [text.heldout_batches(batch=config.batch, limit=config.eval_batches) for text in texts]
        self._evaluate = [training.evaluator(loss, batches) for batches in heldout]
        rate = training.schedule(config.optimizer, config.steps)
        self._step = {each: training.train_step(loss, self._optimizer(each, 1.0), rate) for each in (False, True)}

    def _optimizer(self, periods: bool, rate: float) -> optax.GradientTransformation:
        """Levels that keep their periods, or move every batch. ``rate`` lies in the state: one program for all."""
        every = self._every if periods else dict.fromkeys(self._every, 1)
        whole = training.optimizer(self._config.optimizer, self._config.steps, every, self._model.axes())
        return optax.chain(whole, optax.inject_hyperparams(optax.scale)(step_size=rate))

    def start(self, seed: int) -> Phase:
        """Before the first batch."""
        params = jax.jit(self._model.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
        return Phase(params, [[0, *self._measure(params)]])

    def learn(self, before: Phase, text: int, seed: int, periods: bool, rate: float, said: str) -> Phase:
        """Go on with text 0 or 1. Raises UserError if a loss is no longer finite."""
        config, curve = self._config, list(before.curve)
        params = jax.tree.map(jnp.copy, before.params)  # a step takes its state for its own
        state = training.TrainState(jnp.zeros((), jnp.int32), params, self._optimizer(periods, rate).init(params))
        batches = self._texts[text].train_batches(batch=config.batch, seed=seed)
        for done in tqdm(range(1, config.steps + 1), said, unit="step", mininterval=progress_interval()):
            state, _ = self._step[periods](state, next(batches))
            if done % config.eval_every == 0 or done == config.steps:
                curve.append([before.curve[-1][0] + done, *self._measure(state.params)])
                if not all(map(math.isfinite, curve[-1])):
                    raise training.Diverged(f"{said}: the loss diverged; take a lower --optimizer.learning-rate.")
        return Phase(state.params, curve)

    def _measure(self, params: Any) -> list[float]:
        return [evaluate(params)["bits_per_byte"] for evaluate in self._evaluate]

    def line(self, first: Phase, second: Phase) -> Row:
        """What a JSON line says; ``moved``: how far each level went on the second text, over the norm it had before;
        ``alone``: bits per byte of the first text if of all that the second one changed only that part is kept."""
        before, (_, after, learned) = first.curve[-1][1], second.curve[-1]
        bits = dict(zip(SHOWN, (before, after, after - before, learned), strict=True))
        labels, went = level_labels(first.params, self._every), jax.tree.map(jnp.subtract, second.params, first.params)
        norm = lambda tree, name: optax.tree.norm(jax.tree.map(lambda x, label: x * (label == name), tree, labels))  # noqa: E731
        moved = {name: float(norm(went, name) / norm(first.params, name)) for name in self._every}
        parts = ["embedding", "mixer", *(name for name in self._every if name != STATIC)]
        alone = {name: self._alone(first.params, second.params, name) for name in parts}
        about = {"parameters": training.count_parameters(first.params), "moved": moved, "alone": alone}
        return bits | about | {"curve": second.curve}

    def _alone(self, first: Any, second: Any, part: str) -> float:
        labels = level_labels(first, {part: 1})
        mixed = jax.tree.map(lambda a, b, label: b if label == part else a, first, second, labels)
        return self._evaluate[0](mixed)["bits_per_byte"]


Runs = dict[tuple[str, float], dict[int, Row]]  # row and rate -> seed -> the last run of it


def grouped(lines: Sequence[Row]) -> list[Runs]:
    """The runs on file, those of one setting together."""
    return settings(lines, lambda line: (line["row"], line["second_rate"]))


def more(line: Row, runs: Runs) -> float:
    """Bits per byte forgotten beyond levels_0 of this seed, on the line through its rates, where it learned as much.

    NaN where no two of these rates have the loss on the second text between them.
    """
    same = [of_seed.get(line["seed"]) for (row, _), of_seed in runs.items() if row == "levels_0"]
    points = sorted((one["second"], one["forgotten"]) for one in same if one) or [(math.nan, math.nan)]
    learned, forgotten = np.array(points).T
    return line["forgotten"] - float(np.interp(line["second"], learned, forgotten, left=math.nan, right=math.nan))


def table(lines: Sequence[Row]) -> list[str]:
    """Bits per byte, mean and deviation over seeds, one line per row and rate, under a heading for each setting."""
    said = []
    for runs in grouped(lines):
        about = next(iter(next(iter(runs.values())).values()))["setting"]
        said.append(", ".join(f"{key} {value}" for key, value in about.items()))
        said.append(f"{'row':<11} {'rate':>5}" + "".join(f"{name:>17}" for name in (*SHOWN, "more")) + "  seeds")
        for (row, rate), of_seed in runs.items():
            values = [[*(line[name] for name in SHOWN), more(line, runs)] for line in of_seed.values()]
            cells = "".join(f"{spread(column):>17}" for column in zip(*values, strict=True))
            said.append(f"{row:<11} {rate:>5g}{cells}  {len(of_seed)}")
    return said


def draw(config: DomainsConfig, lines: Sequence[Row]) -> Path:
    """The setting that was run last as a PNG: both texts over tokens, what is forgotten against what is learned."""
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    axes, runs = figure.subplots(1, 3), grouped(lines)[-1]
    for i, row in enumerate(dict.fromkeys(row for row, _ in runs)):
        _draw_row(axes, [list(runs[each].values()) for each in sorted(runs) if each[0] == row], row, f"C{i % 10}")
    for ax, which in zip(axes, ("first", "second"), strict=False):
        ax.set(xlabel="tokens", ylabel="held-out bits per byte", title=f"{which} text, highest rate")
    axes[2].set(xlabel="second text at the end", ylabel="forgotten of the first", title="bits per byte, all rates")
    axes[0].legend(fontsize="small")
    figure.savefig(path := config.results / "domains.png", dpi=120)
    return path


def _draw_row(axes: Any, of_rates: list[list[Row]], row: str, colour: str) -> None:
    """Means over seeds, seeds thin, without the beginning; the rates are ascending."""
    curves, setting = np.array([line["curve"][1:] for line in of_rates[-1]]), of_rates[-1][0]["setting"]
    tokens = curves[0, :, 0] * setting["batch"] * setting["length"]
    for ax, bits in zip(axes, np.moveaxis(curves[..., 1:], 2, 0), strict=False):
        ax.plot(tokens, bits.T, color=colour, linewidth=0.5, alpha=0.4)
        ax.plot(tokens, bits.mean(0), color=colour, label=row)
        ax.grid(True, alpha=0.3)
    points = [[(line["second"], line["forgotten"]) for line in lines] for lines in of_rates]
    for one in points:
        axes[2].plot(*zip(*one, strict=True), ".", color=colour, alpha=0.5)
    axes[2].plot(*zip(*(np.mean(one, 0) for one in points), strict=True), "o-", color=colour, markersize=4)
