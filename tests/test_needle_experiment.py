"""Needles over lengths: how haystacks grow in training, which needles choose and which are reported, table and plot."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_cli import mistake
from test_experiments import lines

from experiments import needle
from experiments.__main__ import main
from hope_jax import train as training
from hope_jax.cli import plots
from hope_jax.data import IGNORE
from hope_jax.levels import Level
from hope_jax.models import ARCHITECTURES, MODELS, Size
from hope_jax.train import OptimizerConfig

TASK = {"rows": ("deltanet",), "size": "nano", "batch": 4, "steps": 6, "eval_batches": 1, "read_lengths": (128, 160)}
TASK |= {"train_lengths": (128, 160), "needles": 5, "eval_every": 6, "optimizer": OptimizerConfig(warmup=2)}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A model that compiles in no time, and a folder where results may be left."""
    monkeypatch.setitem(MODELS, "deltanet-nano", ARCHITECTURES["deltanet"](Size(16, 1, 2, 256, 32, (Level(32),))))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def haystack():
    """Noise."""
    return needle.NeedleConfig(**TASK).haystack()


@pytest.mark.slow
def test_every_row_is_trained_for_each_length_and_read_at_all_and_no_run_is_done_again(tmp_path, capsys, monkeypatch):
    flags = "--rows deltanet --size nano --batch 2 --steps 4 --eval-every 2 --eval-batches 1 --train-lengths 128 200"
    flags += " --read-lengths 128 200 --needles 2 --learning-rates 1e-4 5e-3 --seeds 0 1 --optimizer.warmup 1"
    command = ["needle", *flags.split(), "--results", "r", "--cache", "c"]
    assert main(command) == 0
    printed, rows = capsys.readouterr().out, lines(tmp_path / "r" / "needle.jsonl")
    sweep, others = rows[:4], rows[4:]
    assert [(row["trained"], row["learning_rate"], row["seed"]) for row in sweep] == [
        (length, rate, 0) for length in (128, 200) for rate in (1e-4, 5e-3)
    ]
    best = [min((row for row in sweep if row["trained"] == n), key=lambda row: row["chosen_by"]) for n in (128, 200)]
    expected = [(row["trained"], row["learning_rate"], 1) for row in best]
    assert [(row["trained"], row["learning_rate"], row["seed"]) for row in others] == expected
    assert all([step for step, *_ in row["curve"]] == [0, 2, 4] and len(row["found"]) == 2 for row in rows)
    assert all(row["chosen_by"] == row["curve"][-1][1] < row["curve"][0][1] for row in rows)
    assert len({row["chosen_by"] for row in rows}) == 6, "lengths, rates and seeds must make a difference"
    assert (tmp_path / "r" / "needle-noise.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(needle, "train", lambda *_: pytest.fail("trained again"))
    assert main(command) == main(["needle", "--table", "--results", "r"]) == 0
    assert capsys.readouterr().out == 2 * printed


def test_haystacks_grow_to_the_training_length_with_equal_tokens_and_shorter_ones_come_back(haystack):
    config = needle.NeedleConfig(**TASK | {"batch": 8, "steps": 160, "train_lengths": (128, 1024)})
    shapes = [config.examples(haystack, 1024, 0, index)[0].shape for index in range(160)]
    equal = [(8, 128), (4, 256), (2, 512), (1, 1024)]
    for stage in range(4):
        count = Counter(shapes[40 * stage : 40 * stage + 40])
        assert set(count) == set(equal[: stage + 1]) and count[equal[stage]] > 20
    assert [config.examples(haystack, 128, 0, index)[0].shape for index in (0, 159)] == [(8, 128)] * 2
    assert {config.examples(haystack, 150, 0, index)[0].shape for index in range(80, 160)} == {(8, 128), (6, 150)}
    first, again, other = (config.examples(haystack, 128, seed, 0)[0] for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


def test_needles_that_choose_the_rate_are_not_those_reported(haystack, monkeypatch):
    used = {}

    def fit(setup, batches, heldout, steps, **options):
        used.update(training=next(batches), choosing=heldout[0])
        return training.Result(setup.start(0), {6: {"loss": 2.0, "accuracy": 0.5}})

    def found(model, params, haystack, length, **how):
        used[length] = how
        return length / 1000

    monkeypatch.setattr(training, "fit", fit)
    monkeypatch.setattr(needle.evals.needle, "found", found)
    config = needle.NeedleConfig(**TASK)
    about = {"row": "deltanet", "trained": 160, "learning_rate": 1e-3, "seed": 0}
    row = needle.train(
        config, about, config.setup("deltanet", haystack.tokenizer.vocab_size), haystack, training.Run(Path("run"), {})
    )
    assert row == {"chosen_by": 2.0, "found": [0.128, 0.16], "curve": [[6, 2.0, 0.5]]}
    assert used["choosing"][0].shape == (3, 160) and used["training"][0].shape == (4, 128)
    assert [(used[length]["batches"], used[length]["batch"]) for length in (128, 160)] == [(2, 4), (2, 3)]
    reported = needle.needle(used[128]["seed"], 0, 4, 128, haystack)
    batches = used["training"], used["choosing"], reported
    numbers = [bytes(row[row != IGNORE].tolist()) for _, targets in batches for row in targets]
    assert len(set(numbers)) == len(numbers) == 4 + 3 + 4


def test_a_haystack_of_text_has_its_words_as_tokens_and_a_name_of_its_own(tmp_path):
    (tmp_path / "a.txt").write_text("Elephants remember. " * 50)
    made = needle.NeedleConfig(**TASK | {"path": ("a.txt",)}).haystack()
    assert made.tokenizer.decode(made.tokenizer.encode(" Elephants")[:1]) == " Elephants"
    small = needle.NeedleConfig(**TASK | {"path": ("a.txt",), "words": 172}).haystack()
    assert small.tokenizer.vocab_size == 256 + 172 < made.tokenizer.vocab_size


def result(found=(1.0, 0.5), seed=0, rate=1e-3, chosen_by=1.0, *, row="hope", trained=1024, **setting):
    """A JSON line of an experiment that read at two lengths."""
    about = {"haystack": "noise", "size": "tiny", "read_lengths": [1024, 2048]} | setting
    of_run = {"row": row, "trained": trained, "parameters": 7, "learning_rate": rate, "seed": seed}
    found = found and list(found)
    return {"setting": about, **of_run, "chosen_by": chosen_by, "found": found, "curve": [[0, 5.0, 0.0]]}


def test_the_table_has_each_length_at_the_rate_that_the_other_needles_chose():
    rows = [result(), result((0.5, 0.25), seed=1), result((1.0, 1.0), rate=3e-3, chosen_by=1.1)]
    rows += [result(None, trained=2048, chosen_by=None), result((0.5, None), row="titans")]
    rows += [result((1.0, 1.0), size="30m")]
    first, budget, head, *cells, second, _, _, other = needle.table(rows)
    assert (
        "tiny" in first and "30m" in second and budget.startswith("tuning is not equal yet: hope at 1024 at 0.001, 0")
    )
    assert head.split() == ["row", "parameters", "rate", "1024", "2048", "seeds"]
    assert cells[0].split() == ["hope", "at", "1024", "7", "0.001", "75%", "+-", "35%", "38%", "+-", "18%", "2"]
    assert cells[1].split() == ["hope", "at", "2048", "7", "0.001", "-", "-", "1"]
    assert cells[2].split() == ["titans", "at", "1024", "7", "0.001", "50%", "-", "1"]
    assert other.split()[5] == "100%"


def test_the_plot_has_an_axes_for_each_training_length_and_leaves_out_what_diverged(tmp_path, monkeypatch):
    models = itertools.product(("hope", "titans"), (1024, 2048), (0, 1))
    rows = [result(row=row, trained=length, seed=seed) for row, length, seed in models]
    rows.append(result(None, chosen_by=None, row="mamba2"))
    rows += [result((1.0, None), row="ttt_mlp", trained=trained) for trained in (1024, 2048)]
    drawn = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *_, **__: drawn.extend(figure.axes))
    path = needle.draw(needle.NeedleConfig(results=tmp_path), rows)
    assert path == tmp_path / "needle-noise.png"
    assert [ax.get_title() for ax in drawn] == ["trained at 1024 tokens", "trained at 2048 tokens"]
    for ax in drawn:
        named = [one for one in ax.lines if not one.get_label().startswith("_")]
        assert [one.get_label() for one in named] == ["hope", "titans", "ttt_mlp"]
        np.testing.assert_array_equal(named[0].get_xydata(), [[1024, 1.0], [2048, 0.5]])
        np.testing.assert_array_equal(named[2].get_xydata(), [[1024, 1.0], [2048, np.nan]])


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--rows", "hop"], "no model is called 'hop-tiny'; did you mean 'hope-tiny'"),
        (["--size", "huge"], "no model is called 'hope-huge'"),
        (["--read-lengths", "1024", "85"], "length is 85; question and answer alone need"),
        (["--train-lengths", "80"], "length is 80; question and answer alone need"),
        (["--words", "0"], "length is 128; question and answer alone need 3"),
        (["--shortest", "0"], "--shortest must be at least 1, got 0."),
        (["--words", "-1"], "--words must be at least 0, got -1."),
        (["--read-lengths"], "Give at least one of each: --train-lengths, --read-lengths"),
        (["--batch", "2"], "--batch 2 of --shortest 128 is less than 2048 tokens; raise it."),
        (["--needles", "0"], "--needles must be at least 1, got 0."),
        (["--prompt-weight", "-1"], "--prompt-weight must be at least 0, got -1.0."),
        (["--path", "nowhere.txt"], "corpus path 'nowhere.txt' does not exist"),
        (["--table", "--results", "nowhere"], "There is nothing in nowhere/needle.jsonl"),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence(flags, expected, capfd):
    assert expected in mistake(capfd, ["needle", *flags])
