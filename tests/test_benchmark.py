"""The benchmark: what it counts, one line for each measurement, mistakes in a sentence."""

import json
import math

import pytest
from test_cli import mistake

from hope_jax.cli import benchmark
from hope_jax.cli.main import main
from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.models import ARCHITECTURES, MODELS, Size


@pytest.fixture(autouse=True)
def nano(monkeypatch, tmp_path):
    """A model that compiles in no time, and a folder where results may be left."""
    monkeypatch.setitem(MODELS, "deltanet-nano", ARCHITECTURES["deltanet"](Size(16, 1, 2, 256, 32, (Level(32),))))
    monkeypatch.chdir(tmp_path)


def test_an_unknown_model_is_answered_with_the_closest_name():
    with pytest.raises(UserError, match="did you mean 'transformer_pp'"):
        benchmark.BenchmarkConfig(models=("transformer",))


@pytest.mark.slow
def test_a_benchmark_step_trains_and_reports_what_it_measured():
    config = benchmark.BenchmarkConfig(models=("deltanet",), width=16, layers=1, heads=2, length=16, batch=1, repeats=1)
    (row,) = benchmark.train(config)
    assert row["ratio"] == 1.0 and row["model"] == "deltanet"
    assert row["tokens_per_second"] > 0 and row["temp_bytes"] > 0 and row["gflops"] > 0


MEASURED = {"train": 1, "chunked": 2, "length": 3, "decode": 2, "products": 6}
QUICK = ("products",)  # one of them from end to end
PARTS = [part if part in QUICK else pytest.param(part, marks=pytest.mark.slow) for part in benchmark.PARTS]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_the_benchmark_prints_and_leaves_its_lines(part, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "CHUNKED", ("deltanet",))
    flags = "--models deltanet --width 16 --layers 1 --heads 2 --length 16 --batch 1 --tokens 16 --repeats 1"
    more = "--lengths 16 64 --remat-every 8 --positions 2 4 --model deltanet-nano --results r"
    assert main(f"benchmark {part} {flags} {more}".split()) == 0
    rows = [json.loads(line) for line in (tmp_path / "r" / "benchmark.jsonl").read_text().splitlines()]
    printed = capsys.readouterr().out.splitlines()
    assert [row["part"] for row in rows] == [part] * MEASURED[part]
    assert all(row.items() >= json.loads(line).items() for row, line in zip(rows, printed, strict=True))
    assert 0 < rows[-1]["speed_ratio" if part == "length" else "ratio"] < math.inf


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["train", "--remat-every", "5", "--length", "32"], "--remat-every must divide every length, got 5 for 32"),
        (["length", "--remat-every", "5", "--length", "25"], "--remat-every must divide every length, got 5 for 1024"),
        (["--remat-every", "0"], "--remat-every must divide every length, got 0"),
        (["--models"], "Give at least one of each: --models"),
        (["--lengths", "64", "64"], "--lengths must be two numbers of tokens, ascending, got (64, 64)"),
        (["trian"], "invalid choice 'trian' for argument 'parts'; expected one of ('train',"),
        (["--parts", "train"], "There is no flag --parts;"),
    ],
    ids=str,
)
def test_a_mistake_in_what_to_measure_is_one_sentence(flags, expected, capfd):
    assert expected in mistake(capfd, ["benchmark", *flags])
