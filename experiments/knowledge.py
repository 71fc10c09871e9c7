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
with ``--passes`` times the compute. Every run appends JSON lines to ``knowledge.jsonl`` in ``--results``. About seven
minutes a run on one CPU core.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from experiments.facts import LINE, WORDS, Facts, draw_facts, episodes, names
from experiments.incorporation import Method, Predict, bits_per_byte, recall, stored, tuned, untouched
from hope_jax import LanguageModel, ModelConfig
from hope_jax import train as training
from hope_jax.cli.checks import at_least_one
from hope_jax.cli.parse import parse
from hope_jax.cli.results import Row, append, deviation, open_results, settings
from hope_jax.cli.running import keep_programs, progress_interval
from hope_jax.config import flatten
from hope_jax.context.schedule import schedule_of
from hope_jax.data import DataConfig, make_tokenizer, open_text
from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.nn.feed_forward.cms import CMSConfig
from hope_jax.nn.feed_forward.fast import Writes
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.train.optimizer import OptimizerConfig

FILE = "knowledge.jsonl"
TEST, CHOICE = 1_000_003, 1_000_033
"""Seeds of the facts that are reported, and of those that rates are chosen on."""
VARIED = ("levels", "seeds", "facts", "table", "results", "cache", "data")
"""Flags that may differ between runs that are compared; the fingerprint of the text may not."""
NEEDED = ("setting", "levels", "seed", "how", "facts", "recall", "before", "after")
CHOOSERS = 8
"""Documents that the rates of fine-tuning are chosen on."""
RATES = {"sgd": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0), "adamw": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class KnowledgeConfig:
    """Train small models to store what they read, and ask what they stored."""

    levels: tuple[int, ...] = (0, 1, 2, 3)
    """Numbers of levels in context; every one is a row."""
    periods: tuple[int, ...] = (16, 64, 128)
    """Periods of the levels in tokens, fastest first; a row uses the first of them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of parameters and data; every one is a run."""
    facts: tuple[int, ...] = (8, 16, 32)
    """Numbers of facts to read; an episode of training has length / 32."""
    width: int = 64
    """Model features."""
    layers: int = 2
    """Blocks."""
    steps: int = 1200
    """Batches to train on."""
    batch: int = 8
    """Sequences per batch."""
    text: int = 2
    """Of them, sequences of text; the others are episodes. All of them: the control that never saw such facts."""
    bptt: int | None = None
    """Of how many writes training differentiates, see --cms.bptt of pretrain. 0: the control that is trained to read
    with writes and not to write."""
    length: int = 256
    """Tokens per sequence, a multiple of 32."""
    readers: int = 32
    """Documents that are read and asked about."""
    passes: int = 32
    """The larger compute of fine-tuning, as a multiple of the equal one."""
    table: bool = False
    """Train nothing: print mean and deviation over seeds of everything on file, and draw the setting of these flags."""
    results: Path = Path("experiments/results")
    """Folder of knowledge.jsonl and the figure."""
    cache: Path = Path("runs/.cache")
    """Folder of prepared text and compiled programs."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=3e-3, warmup=100))
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self):
        at_least_one(self, "width", "layers", "steps", "batch", "text", "length", "readers", "passes")
        if not (self.seeds and self.levels and self.facts):
            raise UserError("Give at least one of each: --levels, --seeds, --facts.")
        if not all(0 <= count <= len(self.periods) for count in self.levels):
            raise UserError(
                f"--levels are {list(self.levels)}; expected 0 to {len(self.periods)}, one for each period."
            )
        if self.length % (2 * LINE) or self.length % self.periods[0] or self.length <= max(self.periods):
            raise UserError(f"--length must be a multiple of {2 * LINE} and of the first period, and above the last.")
        if self.text > self.batch:
            raise UserError(f"--text must be at most --batch, got {self.text} of {self.batch}.")
        for count in self.facts:
            if not 1 <= count <= len(names(heldout=True)) or count * LINE % self.periods[0]:
                raise UserError(
                    f"--facts {count}: expected 1 to {len(names(heldout=True))}, so many that "
                    f"their bytes, {LINE} each, are a multiple of the first period, {self.periods[0]}."
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
        writes = Writes(bptt=(self.bptt,) * levels)
        part = CMSConfig(tuple(map(Level, periods)), 4 * self.width // len(periods), in_context=levels, writes=writes)
        mixer = AttentionConfig(max(1, self.width // 32), window=2 * LINE)
        return ModelConfig(mixer, part, self.width, self.layers, 256, self.length)


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    config = parse(KnowledgeConfig, arguments, "python -m experiments knowledge")
    before = training.read_rows(config.results / FILE, NEEDED)  # a damaged line is better known now than after training
    if config.table and not before:
        raise UserError(f"There is nothing in {config.results / FILE}; run something or name another --results.")
    path = open_results(config.results, FILE)
    if not config.table:
        knowledge(config, path)
    rows = training.read_rows(path, NEEDED)
    print("\n".join(table(rows)))
    ours = [row for row in rows if row["setting"] == config.setting(row["setting"]["text fingerprint"])]
    print(f"written: {path}, {draw(config, ours)}" if ours else "There is nothing on file with these flags to draw.")
    return 0


def knowledge(config: KnowledgeConfig, path: Path) -> None:
    """Every run of ``config``, seed by seed; what it showed is on disk when it ends."""
    keep_programs(config.cache)
    data = open_text(config.data, make_tokenizer(config.data), length=config.length, cache_dir=config.cache / "data")
    text = np.concatenate(list(data.heldout_batches(batch=config.readers, limit=1)))
    for seed in config.seeds:
        for levels in config.levels:
            since = time.monotonic()
            model = LanguageModel(config.model(levels))
            params = train(config, model, data, seed, f"{levels} levels, seed {seed}")
            about: Row = {"setting": config.setting(data.fingerprint), "levels": levels, "seed": seed}
            about |= {"parameters": training.count_parameters(params), "seconds": round(time.monotonic() - since, 1)}
            for row in measure(config, model, params, levels, text):
                append(path, about | row)


def train(config: KnowledgeConfig, model: LanguageModel, data: Any, seed: int, named: str) -> Any:
    """Parameters after training on text and episodes."""
    tokens = config.batch * config.length
    tx = training.optimizer(config.optimizer, config.steps, model.config.update_every(tokens), model.axes())
    loss = training.next_token_loss(model, np.ones(model.config.vocab_size))
    step = training.train_step(loss, tx, training.schedule(config.optimizer, config.steps))
    state = jax.jit(functools.partial(training.init_state, model, tx))(jax.random.key(seed))
    texts = data.train_batches(batch=config.text, seed=seed)
    with tqdm(total=config.steps, desc=named, unit="step", mininterval=progress_interval()) as bar:
        for index in range(config.steps):
            told = episodes(seed, index, config.batch - config.text, config.length)
            state, metrics = step(state, jnp.concatenate([next(texts), told]))
            bar.update(1)
            if not index % 50:
                bar.set_postfix_str(f"loss {float(metrics['loss'].value):.3f}")
    return state.params


def measure(config: KnowledgeConfig, model: LanguageModel, params: Any, levels: int, text: np.ndarray) -> Iterator[Row]:
    """A line for each number of facts and way to read them."""
    untaught = untouched(model, params, config.readers)
    before = bits_per_byte(untaught, text)
    for count in config.facts:
        facts = draw_facts(TEST, 0, config.readers, count, heldout=True)
        about = {"facts": count, "before": before, "guessed": recall(untaught, facts)}
        for row, reader in (_by_levels if levels else _by_tuning)(config, model, params, facts):
            yield about | row | {"recall": recall(reader, facts), "after": bits_per_byte(reader, text)}


def _documents(facts: Facts) -> np.ndarray:
    return facts.told.reshape(len(facts.told), -1)


def _by_levels(
    config: KnowledgeConfig, model: LanguageModel, params: Any, facts: Facts
) -> Iterator[tuple[Row, Predict]]:
    """What was read by writes into levels; with the recall that is left when one of them is set back."""
    count, read = (
        len(schedule_of(model, trained=True).periods),
        functools.partial(stored, model, params, _documents(facts)),
    )
    without = [recall(read(forget=level), facts) for level in range(count)] if count > 1 else []
    yield {"how": "levels", "without": without}, read()


def _by_tuning(
    config: KnowledgeConfig, model: LanguageModel, params: Any, facts: Facts
) -> Iterator[tuple[Row, Predict]]:
    """What was read by fine-tuning, at the rate that recalls most of other facts."""
    choice = draw_facts(CHOICE, 0, CHOOSERS, facts.told.shape[1], heldout=True)
    for optimizer, rates in RATES.items():
        for passes in (1, config.passes):
            read = functools.partial(tuned, model, params, chunk=config.periods[0])
            methods = [Method(optimizer, rate, passes) for rate in rates]
            best = max(methods, key=lambda one: recall(read(_documents(choice), method=one), choice))
            yield {"how": f"{optimizer} x{passes}", "rate": best.rate}, read(_documents(facts), method=best)


Group = dict[tuple[int, str, int], list[Row]]


def grouped(rows: Sequence[Row]) -> list[Group]:
    """For each setting on file: (levels, how, facts) -> a row for each seed."""
    found = settings(rows, lambda row: (row["levels"], row["how"], row["facts"]))
    return [{name: list(of[name].values()) for name in sorted(of)} for of in found]


def _mean(rows: Sequence[Row], value: Callable[[Row], float]) -> tuple[float, float]:
    values = [value(row) for row in rows]
    return statistics.mean(values), deviation(values)


def table(rows: Sequence[Row]) -> list[str]:
    """Recall and what was forgotten of held-out text, mean and deviation over seeds."""
    lines = []
    for group in grouped(rows):
        about = next(iter(group.values()))[0]["setting"]
        lines.append(", ".join(f"{name} {value}" for name, value in about.items()))
        lines.append("levels read by    facts  recall     +-  bits before  more after     +-  seeds")
        for (levels, how, facts), of in group.items():
            named, spread = _mean(of, lambda row: row["recall"])
            before, _ = _mean(of, lambda row: row["before"])
            lost, lost_spread = _mean(of, lambda row: row["after"] - row["before"])
            known = f"{levels:>6} {how:<10} {facts:>5} {named:>7.1%} {spread:>6.1%}"
            lines.append(f"{known}  {before:>11.3f}  {lost:>+10.3f} {lost_spread:>6.3f}  {len(of)}")
    return lines


def draw(config: KnowledgeConfig, rows: Sequence[Row]) -> Path:
    """Recall against facts, and against what was forgotten of text, of the setting that ``rows`` end with, as a PNG."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    group = grouped(rows)[-1]
    for i, (levels, how) in enumerate(dict.fromkeys((levels, how) for levels, how, _ in group)):
        name = f"{levels} level{'s' * (levels > 1)}" if levels else f"fine-tuning, {how}"
        style = {"color": f"C{i}", "linestyle": "-" if levels else "--", "marker": "o", "label": name}
        counts = [facts for *row, facts in group if tuple(row) == (levels, how)]
        recalls = [_mean(group[levels, how, count], lambda row: row["recall"]) for count in counts]
        lost = [_mean(group[levels, how, count], lambda row: row["after"] - row["before"])[0] for count in counts]
        means, spreads = zip(*recalls, strict=True)
        left.errorbar(counts, means, np.nan_to_num(spreads), capsize=3, **style)
        right.plot(lost, means, **style)
    left.axhline(1 / len(WORDS), color="black", linewidth=0.8, linestyle=":")
    left.set(xlabel="facts read once", ylabel="recall", ylim=(0, 1.02), xscale="log")
    counts = sorted({facts for *_, facts in group})
    left.set_xticks(counts, [str(count) for count in counts])
    left.minorticks_off()
    right.set(xlabel="held-out text: bits per byte more than before", ylabel="recall", ylim=(0, 1.02))
    right.set_xscale("symlog", linthresh=0.1)
    right.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(config.figure, dpi=120)
    return config.figure
