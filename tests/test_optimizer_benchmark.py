"""The optimizer benchmark: both kinds of a block's steps, the mean over a block, and who is a matrix."""

import json

import jax
import pytest

from experiments.__main__ import main
from hope_jax import MODELS, optim
from hope_jax.cli.optimizer_step import BLOCK, Stepper, random_parameters
from hope_jax.levels import Level
from hope_jax.models import ARCHITECTURES, Size


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    """A model that compiles in no time, with parameters of every kind: matrices, vectors, tables, a level."""
    monkeypatch.setitem(MODELS, "nano", ARCHITECTURES["hope_attention"](Size(16, 1, 2, 32, 32, (Level(32),))))


@pytest.mark.slow
def test_it_prints_and_leaves_a_line_per_optimizer(tmp_path, capsys):
    flags = f"--model nano --optimizers adamw m3 --against adamw --repeats 1 --results {tmp_path}"
    assert main(["optimizer_benchmark", *flags.split()]) == 0
    left = [json.loads(line) for line in (tmp_path / "optimizer_benchmark.jsonl").read_text().splitlines()]
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(row.items() >= line.items() for row, line in zip(left, printed, strict=True))
    adamw, m3 = left
    assert (adamw["optimizer"], adamw["ratio"], m3["optimizer"]) == ("adamw", 1.0, "m3")
    assert m3["ratio"] == pytest.approx(m3["step_ms"] / adamw["step_ms"], rel=0.05)
    assert adamw["state_bytes_per_parameter"] == pytest.approx(8, rel=0.01)


def test_the_two_states_of_m3_are_at_the_start_of_a_block_and_inside_it():
    stepper = Stepper(optim.M3().build(1e-3), random_parameters("nano"))

    def is_m3(part):
        return isinstance(part, optim.M3State)

    def m3_state(state):
        return next(part for part in jax.tree.leaves(state, is_leaf=is_m3) if is_m3(part))

    assert [int(m3_state(one).count) % BLOCK for one in (stepper.start, stepper.inside)] == [0, 1]
    row = stepper.row(3.0, 1.0, 1)
    assert row["step_ms"] == pytest.approx(1e3 * (3.0 + 99 * 1.0) / 100)


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--optimizers", "m4"], "No optimizer is called 'm4'; did you mean 'm3'"),
        (["--model", "hope-31m"], "hope-30m"),
        (["--optimizers"], "Give at least one of each: --optimizers"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence(flags, expected, capsys):
    assert main(["optimizer_benchmark", *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert expected in said and "\n" not in said
