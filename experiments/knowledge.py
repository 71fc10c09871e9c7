"""Knowledge incorporation: read made-up facts once, empty the context, answer: what the levels kept, what was lost.

    python -m experiments knowledge                                # 0 to 3 levels, seeds 0, 1 and 2
    python -m experiments knowledge --levels 2 --seeds 0           # one run of many
    python -m experiments knowledge --table                        # means and deviations of all that was run

Small models of equal parameters are trained on text and on episodes: facts, and the same facts again in another order,
most of them too far back for their attention window. Then each reads facts about names it has never seen, once;
``context.finish`` and ``context.clear``: what is left of them is in the levels. Each fact is asked for in an empty
context (recall; chance is 1/16), and held-out text is read with what was stored, and as before.

Rows: 1, 2 and 3 levels in context; 0 levels: the same model without, which reads by fine-tuning all its parameters, a
step for each chunk as the fastest level makes (equal compute), by SGD or AdamW at the best of several rates, and again
with ``--passes`` times the compute. About seven minutes a run on one CPU core.
"""

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.facts import LINE, WORDS, draw_facts, episodes, names
from experiments.incorporation import RATES, bits_per_byte, by_levels, by_tuning, recall, untouched
from hope_jax import LanguageModel, ModelConfig
from hope_jax import train as training
from hope_jax.cli.checks import at_least, check_seeds, given
from hope_jax.cli.parse import parse
from hope_jax.cli.plots import plot
from hope_jax.cli.results import Results, Row, aligned, deviation, experiment, heading, settings, spread
from hope_jax.config import flatten
from hope_jax.data import DataConfig, TextData, make_tokenizer, open_text
from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.nn.feed_forward.cms import CMSConfig
from hope_jax.nn.feed_forward.fast import Writes
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.train.optimizer import OptimizerConfig

TEST = 1_000_003
"""Seed of the facts that are reported."""
VARIED = ("levels", "seeds", "facts", "table", "results", "cache", "data")
"""Flags that may differ between runs that are compared; the fingerprint of the text may not."""
NEEDED = ("setting", "levels", "seed", "how", "facts", "recall", "before", "after")
Group = dict[tuple[int, str, int], dict[int, Row]]  # levels, how and facts -> seed -> line


@dataclass(frozen=True)
class KnowledgeConfig:
    """Train small models to store what they read, and ask what they stored."""

    levels: tuple[int, ...] = (0, 1, 2, 3)  # Numbers of levels in context; every one is a row.
    periods: tuple[int, ...] = (16, 64, 128)
    """Periods of the levels in tokens, fastest first; a row uses the first of them."""
    seeds: tuple[int, ...] = (0, 1, 2)  # Of parameters and data; every one is a run.
    facts: tuple[int, ...] = (8, 16, 32)  # Numbers of facts to read; an episode of training has length / 32.
    width: int = 64  # Model features.
    layers: int = 2  # Blocks.
    steps: int = 1200  # Batches to train on.
    batch: int = 8  # Sequences per batch.
    text: int = 2
    """Of them, sequences of text; the others are episodes. All of them: the control that never saw such facts."""
    bptt: int | None = None
    """Of how many writes training differentiates, see --cms.bptt of pretrain. 0: the control that is trained to read
    with writes and not to write."""
    length: int = 256  # Tokens per sequence, a multiple of 32.
    readers: int = 32  # Documents that are read and asked about.
    passes: int = 32  # The larger compute of fine-tuning, as a multiple of the equal one.
    table: bool = False
    """Train nothing: print mean and deviation over seeds of everything on file, and draw the setting of these flags."""
    results: Path = Path("experiments/results")  # Folder of knowledge.jsonl and the figure.
    cache: Path = Path("runs/.cache")  # Folder of prepared text, compiled programs and runs that were stopped.
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=3e-3, warmup=100))
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        at_least(self, 1, "width", "layers", "steps", "batch", "text", "length", "readers", "passes")
        given(self, "seeds", "levels", "facts", "periods")
        at_least(self, 1, "periods")
        check_seeds(self)
        if self.data.tokenizer is not None:
            raise UserError("--data.tokenizer cannot be given here: the facts are bytes, and so is the text.")
        most, first, known = len(self.periods), self.periods[0], len(names(heldout=True))
        if not all(0 <= count <= most for count in self.levels):
            raise UserError(f"--levels are {list(self.levels)}; expected 0 to {most}, one for each period.")
        if self.length % (2 * LINE) or self.length % first or self.length <= max(self.periods):
            raise UserError(f"--length must be a multiple of {2 * LINE} and of the first period, and above the last.")
        if self.text > self.batch:
            raise UserError(f"--text must be at most --batch, got {self.text} of {self.batch}.")
        for count in self.facts:
            if not 1 <= count <= known or count * LINE % first:
                raise UserError(
                    f"--facts {count}: expected 1 to {known}, so many that their bytes, {LINE} each, are a multiple of "
                    f"the first period, {first}."
                )
        for count in self.levels:
            self.model(count)

    def setting(self, text: str) -> Row:
        """What must agree before two runs are compared; ``text`` is its fingerprint."""
        about = {name: value for name, value in flatten(self).items() if name.split(".")[0] not in VARIED}
        return about | {"rates": {name: list(rates) for name, rates in RATES.items()}, "text fingerprint": text}

    @property
    def figure(self) -> Path:
        """Where the figure goes; controls have their own."""
        control = f"-text-{self.text}" if self.text == self.batch else "" if self.bptt is None else f"-bptt-{self.bptt}"
        return self.results / f"knowledge{control}.png"

    def model(self, levels: int) -> ModelConfig:
        """The model with so many levels in context: the features of all levels together are the same."""
        periods = self.periods[:levels] or (1,)
        kept: dict[str, Any] = dict(in_context=levels, writes=Writes(bptt=(self.bptt,) * levels), gated=False)
        part = CMSConfig(tuple(map(Level, periods)), 4 * self.width // len(periods), **kept)
        mixer = AttentionConfig(max(1, self.width // 32), window=2 * LINE)
        return ModelConfig(mixer, part, self.width, self.layers, 256, self.length)

    def ways(self, levels: int) -> list[str]:
        """How a model with so many levels reads."""
        tuning = [f"{optimizer} x{passes}" for optimizer in RATES for passes in (1, self.passes)]
        return ["levels"] if levels else tuning


def main(arguments: Sequence[str]) -> int:
    """Train, ask, print and draw; returns the exit status."""
    config = parse(KnowledgeConfig, arguments, "python -m experiments knowledge")
    return experiment(config, "knowledge", NEEDED, knowledge, table, draw)


def knowledge(config: KnowledgeConfig, results: Results) -> None:
    """Every run of ``config``, seed by seed."""
    training.keep_programs(config.cache)
    data = open_text(config.data, make_tokenizer(config.data), length=config.length, cache_dir=config.cache / "data")
    text = np.concatenate(list(data.heldout_batches(batch=config.readers, limit=1)))
    if len(text) < config.readers:
        raise UserError(f"--readers is {config.readers}; the held-out text has {len(text)} sequences, give more text.")
    for seed in config.seeds:
        for levels in config.levels:
            model = LanguageModel(config.model(levels))
            about = {"setting": config.setting(data.fingerprint), "levels": levels, "seed": seed}
            with results.shared(about, functools.partial(train, config, model, data, about)) as trained:
                for facts in config.facts:
                    for how in config.ways(levels):
                        work = functools.partial(measure, config, model, trained, text, facts, how)
                        results.complete(about | {"facts": facts, "how": how}, work)


def train(config: KnowledgeConfig, model: LanguageModel, data: TextData, about: Row, run: training.Run) -> Any:
    """Parameters after training on text and episodes."""
    seed = about["seed"]
    loss = training.next_token_loss(model, np.ones(model.config.vocab_size))
    setup = training.model_setup(model, loss, config.optimizer, config.steps, config.batch * config.length)
    told = functools.partial(episodes, seed, batch=config.batch - config.text, length=config.length)
    texts, steps = data.train_batches(batch=config.text, seed=seed), training.Steps(config.steps, 0)
    batches = training.JoinedBatches(texts, training.ComputedBatches(told))
    label = f"{about['levels']} levels, seed {seed}"
    return training.fit(setup, batches, (), steps, seed=seed, run=run, label=label).params


def measure(
    config: KnowledgeConfig, model: LanguageModel, trained: Any, text: np.ndarray, count: int, how: str, _: training.Run
) -> Row:
    """What a line says of so many facts, read in that way by a model with the parameters ``trained()``."""
    params, facts = trained(), draw_facts(TEST, 0, config.readers, count, heldout=True)
    untaught = untouched(model, params, config.readers)
    about = {"before": bits_per_byte(untaught, text), "guessed": recall(untaught, facts)}
    if how == "levels":
        more, reader = by_levels(model, params, facts)
    else:
        more, reader = by_tuning(model, params, facts, how, config.periods[0])
    about |= {"parameters": training.count_parameters(params)} | more
    return about | {"recall": recall(reader, facts), "after": bits_per_byte(reader, text)}


def grouped(rows: Sequence[Row]) -> list[tuple[Row, Group]]:
    """The settings on file with their runs, sorted."""
    found = settings(rows, lambda row: (row["levels"], row["how"], row["facts"]))
    return [(setting, dict(sorted(runs.items()))) for setting, runs in found]


def _numbers(of_seed: dict[int, Row]) -> list[tuple[float, ...]]:
    """By seed: the recall, bits per byte of text before reading, and how many more after it."""
    found = [(row["recall"], row["before"], row["after"] - row["before"]) for row in of_seed.values()]
    return list(zip(*found, strict=True))


def table(rows: Sequence[Row]) -> list[str]:
    """Recall and what was forgotten of held-out text, mean and deviation over seeds."""
    said = []
    for setting, runs in grouped(rows):
        cells: list[Sequence[Any]] = [("levels", "read by", "facts", "recall", "bits before", "more after", "seeds")]
        for (levels, how, facts), of_seed in runs.items():
            recalls, before, lost = _numbers(of_seed)
            numbers = spread(recalls, ".1%"), f"{statistics.mean(before):.3f}", spread(lost)
            cells.append((levels, how, facts, *numbers, len(of_seed)))
        said += [heading(setting), *aligned(cells)]
    return said


def draw(config: KnowledgeConfig, rows: Sequence[Row]) -> Path | None:
    """Recall against facts, and against what was forgotten of text, of runs with these flags, as a PNG; its path."""
    ours = [row for row in rows if row["setting"] == config.setting(row["setting"]["text fingerprint"])]
    if not ours:
        return None
    _, runs = grouped(ours)[-1]
    with plot(config.figure, 2, (13, 4)) as (left, right):
        for i, (levels, how) in enumerate(dict.fromkeys((levels, how) for levels, how, _ in runs)):
            name = f"{levels} level{'s' * (levels > 1)}" if levels else f"fine-tuning, {how}"
            style = {"color": f"C{i}", "linestyle": "-" if levels else "--", "marker": "o", "label": name}
            lines = {facts: _numbers(of) for (*row, facts), of in runs.items() if tuple(row) == (levels, how)}
            means, lost = ([statistics.mean(numbers[k]) for numbers in lines.values()] for k in (0, 2))
            errors = np.nan_to_num([deviation(recalls) for recalls, *_ in lines.values()])
            left.errorbar(list(lines), means, errors, capsize=3, **style)
            right.plot(lost, means, **style)
        counts = sorted({facts for *_, facts in runs})
        left.axhline(1 / len(WORDS), color="black", linewidth=0.8, linestyle=":")
        left.set(xlabel="facts read once", ylabel="recall", ylim=(0, 1.02), xscale="log")
        left.set_xticks(counts, [str(count) for count in counts])
        left.minorticks_off()
        right.set(xlabel="held-out text: bits per byte more than before", ylabel="recall", ylim=(0, 1.02))
        right.set_xscale("symlog", linthresh=0.1)
    return config.figure
