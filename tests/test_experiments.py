"""Recall and comparison, end to end and tiny: their JSON lines, controls that never write, and the README's code."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark, compare, recall
from experiments.__main__ import main
from hope_jax import LanguageModel
from hope_jax.data import DataConfig
from hope_jax.data.synthetic import IGNORE
from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.models import ARCHITECTURES, MODELS, Size
from hope_jax.train.optimizer import OptimizerConfig

README = Path(__file__).resolve().parent.parent / "README.md"
TASK = {"width": 16, "layers": 1, "length": 16, "pairs": 2, "vocab": 16, "batch": 8, "seeds": (0,), "eval_batches": 1}


def lines(path: Path) -> list[dict]:
    """The JSON lines of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A model that compiles in no time, also under the name the README uses; a folder where results may be left."""
    nano = ARCHITECTURES["deltanet"](Size(16, 1, 2, 256, 32, (Level(32),)))
    for name in ("deltanet-nano", "hope-tiny"):
        monkeypatch.setitem(MODELS, name, nano)
    monkeypatch.chdir(tmp_path)


def test_a_recall_run_learns_and_leaves_one_line_and_a_curve(tmp_path):
    settings = TASK | {"batch": 32, "eval_batches": 4}
    config = recall.RecallConfig(
        **settings, rows=("deltanet",), steps=200, eval_every=100, learning_rates=(1e-2,),
        optimizer=OptimizerConfig(warmup=10), results=tmp_path / "results",
    )  # fmt: skip
    returned = recall.recall(config)
    (row,) = lines(tmp_path / "results" / "recall.jsonl")
    assert row == json.loads(json.dumps(returned[0]))
    assert (row["row"], row["writes"], row["length"], row["pairs"], row["seed"]) == ("deltanet", True, 16, 2, 0)
    assert [step for step, _ in row["curve"]] == [100, 200] and row["accuracy"] == row["curve"][-1][1]
    assert row["accuracy"] > 1 / 6, "naming any of the 8 values at random is right once in 8"
    assert recall.draw(config).read_bytes()[:4] == b"\x89PNG"


def test_a_run_stops_as_soon_as_the_task_is_solved(tmp_path, monkeypatch):
    monkeypatch.setattr(recall, "SOLVED", 0.0)
    config = recall.RecallConfig(**TASK, rows=("deltanet",), steps=4, eval_every=2, results=tmp_path)
    assert [row["steps"] for row in recall.recall(config)] == [2]


def test_accuracy_counts_only_the_positions_that_ask():
    config = recall.RecallConfig(**TASK)
    batch = recall.batch(config, 0, 0)
    inputs, targets = np.split(batch, 2, axis=1)

    class Oracle:
        """Knows every value asked for and is wrong everywhere else."""

        def apply(self, variables, tokens):
            return 20.0 * jax.nn.one_hot(jnp.where(targets == IGNORE, 0, targets), config.vocab), None

    loss, metrics = recall.recall_loss(Oracle())({}, jnp.asarray(batch))
    assert (float(metrics["accuracy"].value), float(metrics["accuracy"].count)) == (1.0, 8 * 2)
    assert float(loss) < 1e-6


@pytest.mark.parametrize("row", ["hope", "titans", "deltanet"])
def test_the_control_never_writes_and_has_the_same_parameters(row, key):
    """Fast weights after reading: with writes they turn, without they at most shrink by retention."""
    turned = {}
    tokens = jax.random.randint(key, (1, 12), 0, 16)
    for writes in (True, False):
        model = LanguageModel(recall.RecallConfig(**TASK, writes=writes, rows=(row,)).model(row))

        @jax.jit
        def read(tokens, model=model):
            params = model.init(key, tokens[:, :1])["params"]
            start = model.init_state(params, batch=1)
            return params, start, model.apply({"params": params}, tokens, start)[1]

        params, *states = read(tokens)
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
    with pytest.raises(UserError, match="no inner learning rate"):
        recall.RecallConfig(rows=("transformer_pp",), writes=False)
    with pytest.raises(UserError, match="did you mean 'titans'"):
        recall.RecallConfig(rows=("titan",))
    with pytest.raises(UserError, match="did you mean 'hope-tiny'"):
        compare.CompareConfig(rows=("hop",))
    with pytest.raises(UserError, match="no inner learning rate"):
        compare.CompareConfig(rows=("transformer_conv_without_writes",))
    with pytest.raises(UserError, match="did you mean 'transformer_pp'"):
        benchmark.BenchmarkConfig(models=("transformer",))


def test_a_task_that_cannot_be_asked_is_one_sentence_and_exit_status_2(capfd):
    assert main(["recall", "--length", "10", "--pairs", "4"]) == 2
    assert "at least 4 * pairs" in capfd.readouterr().err


def test_a_comparison_measures_all_rows_at_the_same_steps_on_the_same_text(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(f"the cat {name} sat on the mat. " * 100)
    config = compare.CompareConfig(
        rows=("deltanet", "deltanet_without_writes"), size="nano", seeds=(0, 1), steps=20, batch=2, length=32,
        eval_every=10, eval_batches=1, results=tmp_path / "results", cache=tmp_path / "cache",
        optimizer=OptimizerConfig(warmup=2), data=DataConfig(path=(str(tmp_path / "*.txt"),), heldout=0.3),
    )  # fmt: skip
    compare.compare(config)
    rows = lines(tmp_path / "results" / "compare.jsonl")
    runs = {(row["row"], row["seed"]) for row in rows}
    assert len(runs) == 4 and len(rows) == 4 * 3
    assert [row["step"] for row in rows[:3]] == [0, 10, 20] and rows[2]["tokens"] == 20 * 2 * 32
    assert len({(row["parameters"], row["fingerprint"]) for row in rows}) == 1
    first, final = (
        {(row["row"], row["seed"]): row["bits_per_byte"] for row in rows if row["step"] == step} for step in (0, 20)
    )
    assert all(0 < final[run] < first[run] for run in runs)
    assert len(set(final.values())) == 4, "writes and seeds must make a difference"
    assert compare.draw(config).read_bytes()[:4] == b"\x89PNG"


def test_the_table_is_mean_and_sample_deviation_and_a_repeated_run_counts_once():
    one = {"text": "prose", "row": "hope", "size": "tiny", "length": 4, "batch": 2, "steps": 5, "learning_rate": 1e-3}
    runs = [(0, 9.0, 5), (0, 2.0, 5), (1, 3.0, 5), (1, 8.0, 3)]
    rows = [one | {"seed": seed, "bits_per_byte": bits, "step": step} for seed, bits, step in runs]
    (line,) = compare.table(rows)[1:]
    assert line.split() == ["prose", "hope", "4", "40", "2.5000", "0.7071", "2"]


def test_operations_counts_loops_and_one_branch():
    def program(a):
        looped = jax.lax.scan(lambda x, _: (x @ a, None), a, None, length=3)[0]
        return jax.lax.cond(looped[0, 0] > 0, lambda x: x @ a, lambda x: x @ a @ a, looped)

    assert benchmark.operations(jax.make_jaxpr(program)(jnp.ones((4, 4))).jaxpr) == (3 + 2) * 2 * 4**3


def test_a_benchmark_step_trains_and_reports_what_it_measured():
    config = benchmark.BenchmarkConfig(models=("deltanet",), width=16, layers=1, heads=2, length=16, batch=1, repeats=1)
    (row,) = benchmark.train(config)
    assert row["ratio"] == 1.0 and row["model"] == "deltanet"
    assert row["tokens_per_second"] > 0 and row["temp_bytes"] > 0 and row["gflops"] > 0


def test_the_code_of_the_readme_runs_and_going_on_equals_one_go():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        names = {}
        exec(compile(block, str(README), "exec"), names)
        if "logits" in names:
            model = names["model"]
            whole, _ = model.apply({"params": names["params"]}, names["whole"])
            np.testing.assert_allclose(names["logits"], whole[:, -names["logits"].shape[1] :], atol=1e-4)


def test_the_readme_names_only_functions_and_tests_that_exist():
    text = README.read_text()
    root = README.parent
    paths = set(re.findall(r"`((?:hope_jax|experiments|tests)/[\w/]+\.py)", text))
    assert paths and not [path for path in paths if not (root / path).exists()]
    for path, name in re.findall(r"`([\w/]+\.py)::(\w+)`", text):
        assert re.search(rf"^\s*(def|class) {name}\b", (root / path).read_text(), flags=re.MULTILINE), (path, name)


def test_replacing_the_rate_changes_nothing_else():
    config = recall.RecallConfig(**TASK).model("hope")
    control = recall.without_writes(config)
    assert dataclasses.replace(control.mixer, rate_max=config.mixer.rate_max) == config.mixer
    assert control.feed_forward == config.feed_forward
