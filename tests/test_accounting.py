"""What ``pretrain`` says of a run before it trains, and records of a few steps."""

import pytest
from test_cli import mistake, text  # noqa: F401, a fixture

from hope_jax import train as training
from hope_jax.cli.main import main
from hope_jax.levels import Level
from hope_jax.models import ARCHITECTURES, MODELS, LanguageModel, Size
from hope_jax.train.flops import flops_per_token
from hope_jax.train.run import load_run

NANO = ARCHITECTURES["transformer_pp"](Size(16, 1, 2, 256, 32, (Level(32),)))
FLAGS = ["--model", "nano", "--batch", "2", "--length", "32", "--steps", "6", "--eval-batches", "1"]


@pytest.fixture
def command(text, tmp_path, monkeypatch):  # noqa: F811
    """``command(*flags)``: the arguments of a training run of six steps on the text."""
    monkeypatch.setitem(MODELS, "nano", NANO)
    run = ["pretrain", "--run", str(tmp_path / "run"), "--data.path", str(text), "--no-compile-cache"]
    return lambda *flags: [*run, *FLAGS, *flags]


def test_a_dry_run_says_what_would_run_and_trains_nothing(command, tmp_path, capsys):
    assert main(command("--dry-run")) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert not (tmp_path / "run").exists()
    count = training.count_parameters(training.abstract_params(LanguageModel(NANO)))
    assert shown["model"].startswith(f"nano, {count:,} parameters") and shown["tokens"] == f"{6 * 2 * 32:,} in all"
    each = flops_per_token(NANO, 32)
    assert shown["FLOPs"] == f"{each:.3g} per token, {64 * each:.3g} per step, {6 * 64 * each:.3g} in all"
    assert shown["state"].startswith(f"{12 * count + 8:,} bytes on each device: parameters {4 * count:,}, optimizer")
    assert int(shown["step"].split()[0].replace(",", "")) > 0


@pytest.mark.parametrize("steps", ["3:2", "5:7", "7", "a:b"])
def test_steps_to_profile_that_cannot_be_are_named(steps, command, capfd):
    said = mistake(capfd, command("--profile", steps))
    assert said == f"--profile is {steps!r}; give START:STOP with START < STOP <= --steps, such as 10:12."


@pytest.mark.slow
def test_the_steps_that_are_asked_for_are_profiled(command, tmp_path, capfd):
    assert main(command("--profile", "2:4", "--sample-tokens", "0")) == 0
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    said = mistake(capfd, command("--profile", "2:4", "--steps", "7"))
    assert "--profile begins at step 2; the run is at step 6 already" in said
    assert load_run(tmp_path / "run").step == 6
