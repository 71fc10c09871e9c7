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
and column "more" says how much more it forgets than ``levels_0`` does where both have learned the second text equally
well. That point of ``levels_0`` lies on the line between two of its rates, which flatters the others. Each text begins
with a new optimizer and a warmup; then the rate is constant. An hour on one core. Expect: slower levels forget no less
than learning less does.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.two_texts import SHOWN, Learner
from hope_jax import ModelConfig
from hope_jax import train as training
from hope_jax.cli.checks import at_least, check_seeds, given, known
from hope_jax.cli.parse import parse
from hope_jax.cli.plots import draw_mean, plot
from hope_jax.cli.results import Results, Row, aligned, experiment, heading, settings, spread
from hope_jax.config import flatten
from hope_jax.data import DataConfig, TextData, make_tokenizer, open_text
from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.models import Size, row_named
from hope_jax.nn.feed_forward.cms import CMSConfig
from hope_jax.train.optimizer import OptimizerConfig

KINDS = {"levels": (True, True), "together": (False, False), "later": (False, True)}
"""Kind of row -> whether its slow levels keep their periods on the first text, and on the second."""
NEEDED = ("row", "second_rate", "seed", "setting", "curve", *SHOWN)
VARIED = ("rows", "second_rates", "seeds", "table", "results", "cache", "first", "second")
"""Flags that may differ between runs that are compared; the fingerprints of the texts may not."""
Runs = dict[tuple[str, float], dict[int, Row]]  # row and rate -> seed -> line


@dataclass(frozen=True)
class DomainsConfig:
    """Learn one text, then another, and measure what is left of the first."""

    rows: tuple[str, ...] = ("levels_0", "levels_1", "levels_2", "levels_3", "together_3", "later_3")
    """levels_K, together_K or later_K with K slow levels."""
    every: tuple[int, ...] = (4, 16, 64)  # Batches between two updates of the slow levels, ascending.
    second_rates: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03)
    """Learning rates on the second text, as multiples of --optimizer.learning-rate; every one is a run."""
    seeds: tuple[int, ...] = (0, 1, 2)  # Of parameters and order of the texts; every one is a run.
    architecture: str = "hope_attention"  # An architecture with a continuum memory system.
    width: int = 96  # Model features.
    layers: int = 2  # Blocks.
    heads: int = 4  # Heads of the mixers; must divide the width.
    steps: int = 448  # Batches of each text.
    batch: int = 2  # Sequences per batch.
    length: int = 256  # Tokens per sequence.
    eval_every: int = 128  # Batches between measurements on held-out text.
    eval_batches: int = 24  # Batches of held-out text of each domain per measurement, always the same ones.
    table: bool = False  # Train nothing: print means and deviations over seeds of everything on file.
    results: Path = Path("experiments/results")  # Folder of domains.jsonl and the plot.
    cache: Path = Path("runs/.cache")  # Folder of prepared text, compiled programs and runs that were stopped.
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=2e-3, final_fraction=1.0))
    """Anew for each text; with a final fraction below 1 the learning rate falls in each."""
    first: DataConfig = field(default_factory=DataConfig)
    second: DataConfig = field(default_factory=DataConfig)
    """The text that is learned after the first; there is no default."""

    def __post_init__(self) -> None:
        at_least(self, 1, "width", "layers", "heads", "steps", "batch", "length", "eval_every", "eval_batches")
        given(self, "rows", "seeds", "second_rates")
        check_seeds(self)
        if not min(self.second_rates) > 0:
            raise UserError(f"--second-rates must be greater than 0, got {self.second_rates}.")
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
        size = Size(self.width, self.layers, self.heads, vocab, self.length, (Level(1),))
        config = row_named(self.architecture)(size)
        if not isinstance(whole := config.feed_forward, CMSConfig):
            takes = "take hope, hope_attention or hope_tnt"
            raise UserError(f"{self.architecture} has no continuum memory system; {takes}.")
        levels = tuple(Level(self.batch * self.length * batches) for batches in (1, *self.every[:slow]))
        cut = dataclasses.replace(whole, levels=levels, hidden=max(1, round(whole.hidden / len(levels))))
        return dataclasses.replace(config, feed_forward=cut)

    def setting(self, texts: Sequence[TextData]) -> Row:
        """What must agree before two runs are compared."""
        about = {name: value for name, value in flatten(self).items() if name.split(".")[0] not in VARIED}
        return about | {"first": texts[0].fingerprint, "second": texts[1].fingerprint}


def main(arguments: Sequence[str]) -> int:
    """Train, print and draw; returns the exit status."""
    config = parse(DomainsConfig, arguments, "python -m experiments domains")
    if not (config.table or config.second.path or config.second.tfds):
        raise UserError("The second text has no default; give files of prose, such as --second.path books/*.txt.")
    return experiment(config, "domains", NEEDED, domains, table, draw)


def domains(config: DomainsConfig, results: Results) -> list[Row]:
    """The lines of all runs, seed by seed so that an early look already compares all rows."""
    training.keep_programs(config.cache)
    tokenizer, cache = make_tokenizer(config.first), config.cache / "data"
    texts = [open_text(x, tokenizer, length=config.length, cache_dir=cache) for x in (config.first, config.second)]
    slows = {slow for _, slow in map(config.parts, config.rows)}
    learners = {slow: Learner(config, config.model(slow, tokenizer.vocab_size), tokenizer, texts) for slow in slows}
    setting = config.setting(texts)
    return [line for seed in config.seeds for line in _of_seed(config, results, learners, setting, seed)]


def _of_seed(config: DomainsConfig, results: Results, learners: dict, setting: Row, seed: int) -> list[Row]:
    """The lines of a seed; rows that learn the first text alike learn it once."""
    lines, learned = [], {}
    with contextlib.ExitStack() as stack:
        for row in config.rows:
            kind, slow = config.parts(row)
            early, later = KINDS[kind]
            alike = {"setting": setting, "seed": seed, "slow": slow, "periods": early and slow > 0}
            if (key := (slow, alike["periods"])) not in learned:
                work = functools.partial(learners[slow].first, seed, early)
                learned[key] = stack.enter_context(results.shared(alike, work))
            for rate in config.second_rates:
                about = {"row": row, "second_rate": rate, "seed": seed, "setting": setting}
                work = functools.partial(learners[slow].line, learned[key], seed, later, rate)
                lines.append(results.complete(about, work))
    return lines


def grouped(lines: Sequence[Row]) -> list[tuple[Row, Runs]]:
    """The settings on file with their runs."""
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
    for setting, runs in grouped(lines):
        cells: list[Sequence[Any]] = [("row", "rate", *SHOWN, "more", "seeds")]
        for (row, rate), of_seed in runs.items():
            values = [[*(line[name] for name in SHOWN), more(line, runs)] for line in of_seed.values()]
            cells.append([row, f"{rate:g}", *map(spread, zip(*values, strict=True)), len(of_seed)])
        said += [heading(setting), *aligned(cells)]
    return said


def draw(config: DomainsConfig, lines: Sequence[Row]) -> Path:
    """The setting that was run last as a PNG: both texts over tokens, what is forgotten against what is learned."""
    setting, runs = grouped(lines)[-1]
    with plot(path := config.results / "domains.png", 3, (13, 4.5)) as axes:
        for row in dict.fromkeys(row for row, _ in runs):
            of_rates = [list(runs[each].values()) for each in sorted(runs) if each[0] == row]
            _draw_row(axes, of_rates, row, setting["batch"] * setting["length"])
        for ax, which in zip(axes, ("first", "second"), strict=False):
            ax.set(xlabel="tokens", ylabel="held-out bits per byte", title=f"{which} text, highest rate")
        axes[2].set(xlabel="second text at the end", ylabel="forgotten of the first", title="bits per byte, all rates")
    return path


def _draw_row(axes: Any, of_rates: list[list[Row]], row: str, tokens: int) -> None:
    """Means over seeds, seeds thin, without the beginning; the rates are ascending."""
    curves = np.array([line["curve"][1:] for line in of_rates[-1]])
    for ax, bits in zip(axes, np.moveaxis(curves[..., 1:], 2, 0), strict=False):
        draw_mean(ax, curves[0, :, 0] * tokens, bits, row)
    points = [[(line["second"], line["forgotten"]) for line in lines] for lines in of_rates]
    (mean,) = axes[2].plot(*np.transpose([np.mean(one, 0) for one in points]), "o-", markersize=4)
    axes[2].plot(*np.transpose(np.concatenate(points)), ".", color=mean.get_color(), alpha=0.5)
