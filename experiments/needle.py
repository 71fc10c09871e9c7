"""A needle in a haystack: models trained on short haystacks look for a number in haystacks of up to 16K tokens.

    python -m experiments needle                           # S-NIAH-1: the haystack is noise
    python -m experiments needle --path books/*.txt        # S-NIAH-2: it is prose
    python -m experiments needle --rows hope titans        # one process of several
    python -m experiments needle --table                   # means and deviations of all on file

The models have equal parameters within 3%. A token is a word of the task, or of the text, or a byte. Training begins
with ``--shortest`` tokens and doubles them in equal stages up to the length that a model is trained for. More than half
of the batches of a stage have its length, the others any length so far, so that none is forgotten; all have about as
many tokens. The loss is that of the answer and, with ``--prompt-weight``, of the prompt. Rows are tuned as in
``compare``, on needles that are not reported. The defaults are 64 runs of 2.5M tokens.
"""

import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from experiments.compare import MODELS_VERSION
from hope_jax import LanguageModel, ModelConfig, evals, model_named
from hope_jax import train as training
from hope_jax.cli.checks import at_least, given
from hope_jax.cli.parse import parse
from hope_jax.cli.plots import draw_mean, plot
from hope_jax.cli.results import Results, Row, experiment, spread
from hope_jax.cli.trials import Trials, at_chosen_rate, grouped, label, named, of_models, tables
from hope_jax.data import IGNORE, Haystack, needle, needle_words, noise_haystack, text_haystack
from hope_jax.errors import UserError

ROWS = ("hope", "hope_attention", "titans", "ttt_linear", "ttt_mlp", "mamba2", "gated_deltanet", "transformer_pp")
TASK_VERSION = 1  # of what is trained on and read: runs of different versions are not compared
CHOOSING_SEED, REPORTED_SEED = 1_000_003, 1_000_033
SAME = ("size", "words", "batch", "shortest", "steps", "prompt_weight", "eval_batches", "needles", "read_lengths")
NEEDED = ("setting", "row", "trained", "learning_rate", "seed", "parameters", "chosen_by", "found", "curve")


@dataclass(frozen=True, kw_only=True)
class NeedleConfig(Trials):
    """Train several models on needles in short haystacks, tune each alike, and count what they find in longer ones."""

    rows: tuple[str, ...] = ROWS  # Architectures, as in the model names before the size.
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Peak learning rates that every row is tried at with the first seed."""
    train_lengths: tuple[int, ...] = (1024, 2048)  # Tokens of the longest haystacks in training; each is a model.
    read_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)  # Tokens of the haystacks that are reported.
    needles: int = 48  # Haystacks that are read at each length, or a few more to fill the last batch.
    path: tuple[str, ...] = ()  # Text files, folders or globs as the haystack. Empty: noise.
    words: int = 768  # Most words that are tokens; all other text is bytes. 0: all text is.
    size: str = "tiny"  # Size of all models.
    shortest: int = 128  # Tokens of the haystacks that training begins with.
    batch: int = 32  # Sequences of the shortest haystacks in a batch; of longer ones fewer, with as many tokens.
    steps: int = 600  # Batches to train on.
    eval_batches: int = 4  # Batches of the needles that choose the learning rate.
    prompt_weight: float = 1.0  # Weight of the mean loss on the prompt beside that on the answer; 0: the answer alone.
    table: bool = False  # Train nothing: print and draw what is on file.
    optimizer: training.OptimizerConfig = field(
        default_factory=lambda: training.OptimizerConfig(warmup=50, final_fraction=0.3)
    )
    """The longest haystacks come last, so the learning rate stays high."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given(self, "train_lengths", "read_lengths")
        at_least(self, 1, "needles", "shortest")
        at_least(self, 0, "prompt_weight", "words")
        if (most := max(self.train_lengths)) > self.batch * self.shortest:
            raise UserError(f"--batch {self.batch} of --shortest {self.shortest} is less than {most} tokens; raise it.")
        for row in self.rows:
            training.answer_loss(LanguageModel(self.model(row)), IGNORE)

    def model(self, row: str, vocab: int = 256) -> ModelConfig:
        """The model of that row. Raises UserError if there is none."""
        return replace(model_named(f"{row}-{self.size}"), vocab_size=vocab)

    def haystack(self) -> Haystack:
        """Where needles are hidden, with its tokenizer. Raises UserError for lengths or paths that do not do."""
        tokenizer = needle_words(self.words, self.path)
        found = text_haystack(tokenizer, self.path) if self.path else noise_haystack(tokenizer)
        for length in (self.shortest, *self.train_lengths, *self.read_lengths):
            needle(0, 0, 1, length, found)
        return found

    def setup(self, row: str, vocab: int) -> training.Setup:
        """How that row is trained; its programs serve all lengths, rates and seeds."""
        model, tokens = LanguageModel(self.model(row, vocab)), self.batch * self.shortest
        loss = training.answer_loss(model, IGNORE, self.prompt_weight)
        return training.model_setup(model, loss, self.at_rate_1, self.steps, tokens).for_any_rate()

    def sequences(self, length: int) -> int:
        """How many sequences of that length a batch has."""
        return max(1, self.batch * self.shortest // length)

    def examples(self, haystack: Haystack, trained: int, seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Batch number ``index`` of training for ``trained`` tokens: inputs and targets [B, T]."""
        doubled = (self.shortest * 2**i for i in itertools.count())
        lengths = [*itertools.takewhile(lambda length: length < trained, doubled), trained]
        stage, rng = index * len(lengths) // self.steps, np.random.default_rng([seed, index, 1])
        length = lengths[stage if rng.random() < 0.5 else rng.integers(stage + 1)]
        return needle(seed, index, self.sequences(length), length, haystack)


def main(arguments: Sequence[str]) -> int:
    """Train, read, print and draw; returns the exit status."""
    config = parse(NeedleConfig, arguments, "python -m experiments needle")
    return experiment(config, "needle", NEEDED, needles, table, draw)


def needles(config: NeedleConfig, results: Results) -> None:
    """The sweep of every row at every training length, then seed by seed all of them at their rates."""
    training.keep_programs(config.cache)
    haystack = config.haystack()
    kind = f"text-{hashlib.sha256(haystack.ids.tobytes()).hexdigest()[:10]}" if config.path else "noise"
    same = {"haystack": kind, "models": MODELS_VERSION, "task": TASK_VERSION}
    same |= {name: getattr(config, name) for name in SAME}
    setups = {row: config.setup(row, haystack.tokenizer.vocab_size) for row in config.rows}
    counts = {row: training.count_parameters(setup.shapes().params) for row, setup in setups.items()}

    def line(cell: tuple[str, int], rate: float, seed: int) -> Row:
        row, trained = cell
        about = {"setting": same | config.recipe(), "row": row, "trained": trained, "parameters": counts[row]}
        about |= {"learning_rate": rate, "seed": seed}
        return results.complete(about, lambda run: train(config, about, setups[row], haystack, run))

    config.tune(list(itertools.product(config.rows, config.train_lengths)), line)


def train(config: NeedleConfig, about: Row, setup: training.Setup, haystack: Haystack, run: training.Run) -> Row:
    """Train one model and let it read; what its line says. Without numbers at the end it has diverged."""
    length, each = about["trained"], config.sequences(about["trained"])
    batches = training.ComputedBatches(functools.partial(config.examples, haystack, length, about["seed"]))
    heldout = [needle(CHOOSING_SEED, index, each, length, haystack) for index in range(config.eval_batches)]
    params, measured = config.fit_at_rate(setup, about, batches, heldout, run)
    curve = [[step, means["loss"], means["accuracy"]] for step, means in measured.items()]
    if params is None:
        return {"chosen_by": None, "found": None, "curve": curve}
    model = LanguageModel(config.model(about["row"], haystack.tokenizer.vocab_size))
    lengths = training.progress(config.read_lengths, desc=f"reading, {label(about)}", unit="length")
    how = {"needles": config.needles, "tokens": setup.tokens, "seed": REPORTED_SEED}
    found = evals.needle.found_at(model, params, haystack, lengths, **how)
    return {"chosen_by": curve[-1][1], "found": found, "curve": curve}


def table(lines: Sequence[Row]) -> list[str]:
    """Needles found at each length, mean and deviation over seeds, under a heading for each setting."""
    return tables(lines, "other needles", _cells)


def _cells(lines: Sequence[Row]) -> Row:
    """The columns of a model, from its runs at the chosen rate."""
    lengths = lines[0]["setting"]["read_lengths"]
    shares = np.array([line["found"] or [None] * len(lengths) for line in lines], float).T.tolist()
    about = {"parameters": f"{lines[0]['parameters']:,}", "rate": f"{lines[0]['learning_rate']:g}"}
    found = {length: spread(of_length, ".0%") for length, of_length in zip(lengths, shares, strict=True)}
    return {"row": named(lines[0]), **about, **found, "seeds": len(lines)}


def draw(config: NeedleConfig, lines: Sequence[Row]) -> Path:
    """Needles found over length, of the setting that was run last, as a PNG; its path."""
    setting, runs = of_models(lines)[-1]
    known = [[line for line in chosen if line["found"]] for chosen in at_chosen_rate(runs).values()]
    trained = grouped([line for chosen in known for line in chosen], lambda line: line["trained"])
    path, size = config.results / f"needle-{setting['haystack']}.png", (6.5 * len(trained), 4)
    with plot(path, len(trained), size) as axes:
        for ax, (length, of_length) in zip(np.ravel(axes), trained.items(), strict=True):
            for row, of_row in grouped(of_length, lambda line: line["row"]).items():
                found = np.array([line["found"] for line in of_row], float)  # None becomes NaN, a gap
                draw_mean(ax, setting["read_lengths"], found, row, marker="o")
            ax.set_xscale("log", base=2)
            ax.set(
                xlabel="tokens read", ylabel="needles found", ylim=(-0.02, 1.02), title=f"trained at {length} tokens"
            )
    return path
