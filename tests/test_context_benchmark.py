"""The benchmark of levels in context: a line for each thing measured, ratios against the training step."""

import json

import pytest

from experiments import context_benchmark
from experiments.__main__ import main
from hope_jax import MODELS
from hope_jax.levels import Level
from hope_jax.models import ARCHITECTURES, Size


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    """A model that compiles in no time."""
    row = ARCHITECTURES["hope_attention"](Size(16, 1, 2, 32, 32, (Level(1024),)))
    monkeypatch.setitem(MODELS, "nano", row)


@pytest.mark.slow
def test_it_prints_and_leaves_a_line_for_each_period(tmp_path, capsys):
    flags = f"--model nano --periods 128 512 --length 512 --streams 2 --batch 1 --repeats 1 --results {tmp_path}"
    assert main(["context_benchmark", *flags.split()]) == 0
    left = [json.loads(line) for line in (tmp_path / "context_benchmark.jsonl").read_text().splitlines()]
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(row.items() >= line.items() for row, line in zip(left, printed, strict=True))
    names = ["training", "reading", "learning, period 128", "training through writes, period 128"]
    assert [row["what"] for row in left] == [*names, "learning, period 512"]
    for row in left:
        assert row["ratio"] == pytest.approx(row["tokens_per_second"] / left[0]["tokens_per_second"], rel=0.02)


@pytest.mark.slow
def test_speeds_are_tokens_of_a_call_by_its_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(context_benchmark, "best_seconds", lambda calls, _: dict.fromkeys(calls, 2.0))
    flags = f"--model nano --periods 128 --length 256 --streams 3 --batch 4 --results {tmp_path}"
    assert main(["context_benchmark", *flags.split()]) == 0
    left = [json.loads(line) for line in (tmp_path / "context_benchmark.jsonl").read_text().splitlines()]
    assert [row["tokens_per_second"] for row in left] == [4 * 128, 3 * 128, 3 * 128, 4 * 128]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--periods", "100"], "--periods must divide --length, got 100 for 1024"),
        (["--periods"], "Give at least one of each: --periods"),
        (["--streams", "0"], "--streams must be at least 1"),
        (["--model", "transformer_pp-tiny"], "need periods and a model with levels"),
        (["--repeats", "0"], "--repeats must be at least 1"),
    ],
)
def test_wrong_flags_are_one_plain_sentence(flags, said, capfd):
    assert main(["context_benchmark", *flags]) == 2
    assert said in capfd.readouterr().err
