"""Language models at equal parameters, tokens and tuning: what the memory is worth on text, and what it is not.

    python -m experiments compare --data.path books/*.txt --steps 600          # every row, four rates, three seeds
    python -m experiments compare --rows hope --name prose ...                 # one process of several
    python -m experiments compare --table                                      # means and deviations of all on file

The rows: ``hope``; ``hope_without_writes``, the same with the inner learning rate at 0; ``transformer_pp``; and
``transformer_conv``, the Transformer with Hope's short convolutions, without which a gain says nothing about memory.
All see the same batches of the same text. Every row is trained with the first seed at each of ``--learning-rates``; the
rate with the lowest loss on one half of the held-out batches is its rate for the other seeds; the other half is
reported. Without --data.path the text is the Python standard library. A run of the defaults takes minutes on a CPU.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hope_jax import LanguageModel, ModelConfig, model_named
from hope_jax import train as training
from hope_jax.cli.in_context import check_reading
from hope_jax.cli.parse import parse
from hope_jax.cli.plots import draw_mean, plot
from hope_jax.cli.results import Results, Row, experiment, spread
from hope_jax.cli.trials import Trials, at_chosen_rate, of_models, tables
from hope_jax.data import DataConfig, TextData, Tokenizer, make_tokenizer, open_text
from hope_jax.errors import UserError
from hope_jax.models import without_writes

CONTROL = "_without_writes"
MODELS_VERSION = 4
"""Of what models compute and start from: runs of different versions are not compared. A change of a row that changes
its parameter count needs no new version, as a row with another count is another model in the tables."""
COLUMNS = ("row", "parameters", "rate", "bits per byte", "at the start", "tokens/s", "step, MB", "state, KB", "seeds")
SAME = ("size", "length", "batch", "steps", "eval_batches")
NEEDED = ("setting", "row", "learning_rate", "seed", "parameters", "start", "chosen_by", "bits_per_byte", "curve")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Trials):
    """Train several models on the same text, tune each alike and compare them on held-out text."""

    rows: tuple[str, ...] = ("hope", "hope_without_writes", "transformer_pp", "transformer_conv")
    """Architectures; the ending _without_writes switches the writes of a memory off."""
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 5e-3, 1e-2)
    """Peak learning rates that every row is tried at with the first seed."""
    size: str = "tiny"  # Size of all models.
    name: str = "text"  # What to call the text in the results.
    steps: int = 600  # Batches to train on.
    batch: int = 4  # Sequences per batch.
    length: int = 512  # Tokens per sequence.
    eval_every: int = 100  # Batches between measurements on held-out text.
    eval_batches: int = 16  # Batches of held-out text that are reported; as many others choose the learning rate.
    table: bool = False  # Train nothing: print and draw what is on file.
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.name).name != self.name:
            raise UserError(f"--name {self.name!r} becomes part of a file name; give a plain word.")
        for row in self.rows:
            check_reading(self.model(row), self.length)

    def model(self, row: str, vocab: int = 256) -> ModelConfig:
        """The model of that row. Raises UserError if there is none."""
        config = dataclasses.replace(model_named(f"{row.removesuffix(CONTROL)}-{self.size}"), vocab_size=vocab)
        return without_writes(config) if row.endswith(CONTROL) else config

    def setup(self, row: str, tokenizer: Tokenizer) -> training.Setup:
        """How that row is trained; its programs serve all rates and seeds."""
        model = LanguageModel(self.model(row, tokenizer.vocab_size))
        loss = training.next_token_loss(model, tokenizer.byte_lengths)
        return training.model_setup(model, loss, self.at_rate_1, self.steps, self.batch * self.length).for_any_rate()

    def setting(self, text: TextData) -> Row:
        """What must agree before two runs are compared."""
        same = {name: getattr(self, name) for name in SAME}
        return {"text": self.name, "models": MODELS_VERSION, "fingerprint": text.fingerprint, **same, **self.recipe()}


def main(arguments: Sequence[str]) -> int:
    """Train, print and draw; returns the exit status."""
    config = parse(CompareConfig, arguments, "python -m experiments compare")
    return experiment(config, "compare", NEEDED, compare, table, draw)


def compare(config: CompareConfig, results: Results) -> None:
    """The sweep of every row, then seed by seed all rows at their rates: an early look compares all of them."""
    training.keep_programs(config.cache)
    tokenizer = make_tokenizer(config.data)
    text = open_text(config.data, tokenizer, length=config.length, cache_dir=config.cache / "data")
    setting, setups = config.setting(text), {row: config.setup(row, tokenizer) for row in config.rows}
    counts = {row: training.count_parameters(setup.shapes().params) for row, setup in setups.items()}
    cost_of = functools.cache(lambda row: costs(config, LanguageModel(config.model(row)), setups[row]))

    def line(row: str, rate: float, seed: int) -> Row:
        about = {"setting": setting, "row": row, "parameters": counts[row], "learning_rate": rate, "seed": seed}
        return results.complete(about, lambda run: train(config, about, setups[row], text, run) | cost_of(row))

    config.tune(config.rows, line)


def train(config: CompareConfig, about: Row, setup: training.Setup, text: TextData, run: training.Run) -> Row:
    """Train one model; what its line says. Without numbers at the end it has diverged."""
    choosing, reported = halves(text.heldout_batches(batch=config.batch, limit=2 * config.eval_batches))
    batches = text.train_batches(batch=config.batch, seed=about["seed"])
    params, measured = config.fit_at_rate(setup, about, batches, reported, run)
    curve = [[step * setup.tokens, means["bits_per_byte"]] for step, means in measured.items()]
    chosen_by = None if params is None else setup.evaluator(choosing)(params)["bits_per_byte"]
    return {
        **{"chosen_by": chosen_by, "bits_per_byte": None if params is None else curve[-1][1]},
        **{"start": curve[0][1] if curve else None},
        **{"tokens_per_second": round(training.median_speed(run.folder)), "curve": curve},
    }


def costs(config: CompareConfig, model: LanguageModel, setup: training.Setup) -> Row:
    """Bytes of memory: what a training step needs besides parameters and batch, and the state of one sequence."""
    batch = jax.ShapeDtypeStruct((config.batch, config.length + 1), np.int32)
    state = training.state_bytes(model, setup.shapes().params, config.length)
    return {"step_bytes": setup.temporary_bytes(batch), "state_bytes": state}


def halves(batches: Any) -> tuple[list[Any], list[Any]]:
    """Every other batch to choose by, and the others to report. Raises UserError where there is only one."""
    batches = list(batches)
    if len(batches) < 2:
        raise UserError("The held-out text fills one batch, but two are needed: give more text or a smaller --batch.")
    return batches[1::2], batches[::2]


def table(lines: Sequence[Row]) -> list[str]:
    """Held-out bits per byte at the end, mean and deviation over seeds, under a heading for each setting."""
    return tables(lines, "other text", _cells)


def _cells(lines: Sequence[Row]) -> Row:
    """The columns of a row, from its runs at the chosen rate."""
    bits, starts = ([math.nan if line[n] is None else line[n] for line in lines] for n in ("bits_per_byte", "start"))
    speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
    speed = f"{statistics.mean(speeds):,.0f}" if speeds else "-"
    step, state = (next((line[n] for line in lines if n in line), None) for n in ("step_bytes", "state_bytes"))
    memory = ["-" if step is None else f"{step / 1e6:,.0f}", "-" if state is None else f"{state / 1e3:,.0f}"]
    about = [lines[0]["row"], f"{lines[0]['parameters']:,}", f"{lines[0]['learning_rate']:g}"]
    cells = [*about, spread(bits, ".4f"), f"{statistics.mean(starts):.3f}", speed, *memory, len(lines)]
    return dict(zip(COLUMNS, cells, strict=True))


def draw(config: CompareConfig, lines: Sequence[Row]) -> Path | None:
    """Bits per byte over tokens of the last setting of this text and length at the chosen rates, as a PNG; its path."""
    shown = (config.name, config.length)
    same = [line for line in lines if (line["setting"]["text"], line["setting"]["length"]) == shown]
    if not same:
        return None
    with plot(path := config.results / f"compare-{config.name}-{config.length}.png") as axes:
        for (row, _), chosen in at_chosen_rate(of_models(same)[-1][1]).items():
            curves = [dict(line["curve"][1:]) for line in chosen if line["bits_per_byte"] is not None]
            if curves:
                shared, control = sorted(set.intersection(*map(set, curves))), row.endswith(CONTROL)
                draw_mean(axes, shared, [[curve[tokens] for tokens in shared] for curve in curves], row, control)
        axes.set(xlabel="tokens", ylabel="held-out bits per byte", title=f"{config.name}, {config.length} tokens")
    return path
