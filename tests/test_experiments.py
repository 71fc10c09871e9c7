"""The experiments end to end and tiny: JSON lines, tables, controls that never write, mistakes in a sentence."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn

from experiments import recall
from experiments.__main__ import main
from experiments.compare import MODELS_VERSION
from hope_jax import LanguageModel
from hope_jax.cli import plots, trials
from hope_jax.cli.results import Results
from hope_jax.cli.trials import at_best_rate, percent
from hope_jax.data import IGNORE
from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.models import ARCHITECTURES, MODELS, Size, without_writes
from hope_jax.train import OptimizerConfig, answer_loss

TASK = {"width": 16, "layers": 1, "length": 16, "pairs": 2, "vocab": 16, "batch": 8, "seeds": (0,), "eval_batches": 1}


def lines(path: Path) -> list[dict]:
    """The JSON lines of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A model that compiles in no time, and a folder where results may be left."""
    nano = ARCHITECTURES["deltanet"](Size(16, 1, 2, 256, 32, (Level(32),)))
    monkeypatch.setitem(MODELS, "deltanet-nano", nano)
    monkeypatch.chdir(tmp_path)


def results_of(config):
    """The results of a configuration of ``recall``."""
    return Results(config.results, "recall", config.cache)


@pytest.mark.slow
def test_a_recall_run_learns_and_leaves_one_line_and_a_curve(tmp_path):
    settings = TASK | {"batch": 32, "eval_batches": 4}
    config = recall.RecallConfig(
        **settings, rows=("deltanet",), steps=200, eval_every=100, learning_rates=(1e-2,),
        optimizer=OptimizerConfig(warmup=10), results=tmp_path / "results",
    )  # fmt: skip
    returned = recall.recall(config, results_of(config))
    (row,) = lines(tmp_path / "results" / "recall.jsonl")
    assert row == json.loads(json.dumps(returned[0]))
    assert (row["row"], row["writes"], row["length"], row["pairs"], row["seed"]) == ("deltanet", True, 16, 2, 0)
    steps = [step for step, _ in row["curve"]]
    assert steps in ([0, 100], [0, 100, 200]) and row["accuracy"] == row["curve"][-1][1]
    assert (steps[-1] < 200) == (row["curve"][1][1] >= recall.SOLVED), "a run ends when the task is solved"
    assert row["accuracy"] > 1 / 6, "naming any of the 8 values at random is right once in 8"
    assert recall.draw(config, [row]).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_recall_command_says_what_each_model_reached_at_its_best_rate(tmp_path, capsys):
    task = "recall --rows deltanet --width 16 --layers 1 --length 16 --pairs 2 --vocab 16 --batch 8 --eval-batches 1"
    assert main(f"{task} --seeds 0 1 --steps 2 --results r".split()) == 0
    rows = lines(tmp_path / "r" / "recall.jsonl")
    first, second = (row["accuracy"] for row in rows)
    expected = f"{(first + second) / 2:.2%} +- {abs(first - second) / 2**0.5:.2%} (2 seeds, rate 0.003)"
    assert f"deltanet {expected}" in " ".join(capsys.readouterr().out.split())


def test_the_summary_takes_the_best_rate_by_its_mean_over_seeds():
    runs = [(1e-3, 0.5, True), (1e-3, 0.7, True), (1e-2, 0.9, True), (1e-2, 0.1, True), (1e-3, 0.2, False)]
    rows = [{"row": "hope", "writes": w, "learning_rate": rate, "accuracy": a} for rate, a, w in runs]
    best = at_best_rate(rows, "accuracy")
    assert list(best) == ["hope", "hope without writes"]
    written, control = (percent(of_name, "accuracy").strip() for of_name in best.values())
    assert written == "60.00% +- 14.14% (2 seeds, rate 0.001)"
    assert control == "20.00% (1 seeds, rate 0.001)"


@pytest.mark.parametrize("other", [{"vocab": 32}, {"width": 32}, {"layers": 2}, {"pairs": 1}, {"heads": 4}], ids=str)
def test_only_runs_of_the_same_task_and_size_are_drawn_together(other, tmp_path, monkeypatch):
    config = recall.RecallConfig(**TASK, results=tmp_path)
    row = {name: getattr(config, name) for name in recall.TASK} | {
        "row": "hope",
        "models": MODELS_VERSION,
        "curve": [[1, 0.5]],
    }
    drawn = []
    monkeypatch.setattr(recall, "draw_curves", lambda axes, rows, order: drawn.extend(rows))
    recall.draw(config, [row, row | other, row | {"models": 2}])
    assert drawn == [row]


def test_rows_of_recall_may_tell_their_period(tmp_path):
    config = recall.RecallConfig(**TASK, rows=("hope@8",), results=tmp_path)
    mixer: Any = config.model("hope@8").mixer
    assert mixer.c_memory == 8


def test_every_row_of_recall_has_another_look(tmp_path, monkeypatch):
    """Also a row whose first line is the 41st of all names and lines; there are 40 looks."""
    config = recall.RecallConfig(**TASK, results=tmp_path)
    drawn = {name: getattr(config, name) for name in recall.TASK} | {"models": MODELS_VERSION, "curve": [[1, 0.5]]}
    names, looks = [*["hope@8"] * 7, "hope@4", *ARCHITECTURES], []
    monkeypatch.setattr(trials, "look", lambda *of, **how: looks.append(plots.look(*of, **how)) or looks[-1])
    assert recall.draw(config, [drawn | {"row": name} for name in names]).exists()
    assert len({str(look) for look in looks}) == len(set(names)) == len(looks)


def test_a_run_stops_as_soon_as_the_task_is_solved(tmp_path, monkeypatch):
    monkeypatch.setattr(recall, "SOLVED", 0.0)
    config = recall.RecallConfig(**TASK, rows=("deltanet",), steps=4, eval_every=2, results=tmp_path)
    assert [row["steps"] for row in recall.recall(config, results_of(config))] == [0]


def test_accuracy_counts_only_the_positions_that_ask():
    config = recall.RecallConfig(**TASK)
    inputs, targets = config.examples(0, 0)

    class Oracle:
        """Knows every value asked for and is wrong everywhere else."""

        config = None

        def apply(self, variables, tokens):
            return 20.0 * jax.nn.one_hot(jnp.where(targets == IGNORE, 0, targets), config.vocab), None

    loss, metrics = jax.jit(answer_loss(Oracle(), IGNORE))({}, (jnp.asarray(inputs), jnp.asarray(targets)))
    assert (float(metrics["accuracy"].value), float(metrics["accuracy"].count)) == (1.0, 8 * 2)
    assert float(loss) < 1e-6


def test_the_loss_on_the_prompt_is_of_the_next_inputs_and_the_metrics_are_of_the_answer_alone():
    rng = np.random.default_rng(0)
    logits, inputs = rng.normal(size=(2, 5, 7)), rng.integers(7, size=(2, 5))
    targets = np.full((2, 5), IGNORE)
    targets[:, 2:4] = rng.integers(7, size=(2, 2))
    nats = np.log(np.exp(logits).sum(-1, keepdims=True)) - logits
    answer = np.mean([nats[i, t, targets[i, t]] for i in range(2) for t in (2, 3)])
    prompt = np.mean([nats[i, t, inputs[i, t + 1]] for i in range(2) for t in (0, 1)])
    model = SimpleNamespace(config=None, apply=lambda variables, tokens: (jnp.asarray(logits), None))
    for weight in (0.0, 0.5):
        loss, metrics = jax.jit(answer_loss(model, IGNORE, weight))({}, (inputs, targets))
        np.testing.assert_allclose([loss, metrics["loss"].value], [answer + weight * prompt, answer], rtol=1e-5)


@pytest.mark.parametrize(
    "row", [*(pytest.param(row, marks=pytest.mark.slow) for row in ("hope", "titans")), "deltanet"]
)
def test_the_control_never_writes_and_has_the_same_parameters(row, key):
    """Fast weights after reading: with writes they turn, without they at most shrink by retention."""
    turned = {}
    tokens = jax.random.randint(key, (1, 12), 0, 16)
    for writes in (True, False):
        model = LanguageModel(recall.RecallConfig(**TASK, writes=writes, rows=(row,)).model(row))
        params = drawn(model.init, tokens[:, :1])

        @jax.jit
        def read(params, tokens, model=model):
            start = model.init_state(params, batch=1)
            return start, model.apply({"params": params}, tokens, start)[1]

        states = read(params, tokens)
        turned[writes] = max(map(_turn, *(_running(state.mixer.fast) for state in states)))
        turned[writes, "parameters"] = jax.tree.map(jnp.shape, params)
    assert turned[False] < 1e-5 < 1e-3 < turned[True]
    assert turned[True, "parameters"] == turned[False, "parameters"]


def _running(fast) -> list:
    """Running weights of all memories, of one group or of three."""
    groups = [fast] if hasattr(fast, "running") else list(fast)
    return [weights for group in groups for weights in group.running]


def _turn(start, end) -> float:
    """Largest part of any matrix of ``end`` that is not a multiple of the same matrix of ``start``."""
    scale = (start * end).sum((-1, -2), keepdims=True) / ((start**2).sum((-1, -2), keepdims=True) + 1e-30)
    return float(jnp.abs(end - scale * start).max())


def test_attention_has_no_control_and_unknown_rows_name_the_closest():
    with pytest.raises(UserError, match="only memories with a setting rate_max"):
        recall.RecallConfig(rows=("transformer_pp",), writes=False)
    with pytest.raises(UserError, match="did you mean 'titans'"):
        recall.RecallConfig(rows=("titan",))


def test_a_task_that_cannot_be_asked_is_one_sentence_and_exit_status_2(capfd):
    assert main(["recall", "--length", "10", "--pairs", "4"]) == 2
    assert "at least 4 * pairs" in capfd.readouterr().err


def test_replacing_the_rate_changes_nothing_else():
    config = recall.RecallConfig(**TASK).model("hope")
    control = without_writes(config)
    assert dataclasses.replace(control.mixer, rate_max=config.mixer.rate_max) == config.mixer
    assert control.feed_forward == config.feed_forward
