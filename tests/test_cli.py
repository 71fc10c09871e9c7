"""The command line as a user meets it: exact resume, Ctrl-C, damaged checkpoints, one plain sentence per mistake."""

import dataclasses
import importlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from made_once import setups_made_once

from experiments import __main__ as experiments
from hope_jax import MODELS
from hope_jax import train as training
from hope_jax.cli import pretrain
from hope_jax.cli.main import main, without
from hope_jax.cli.parse import parse
from hope_jax.levels import Level
from hope_jax.train.run import load_config, load_run

ROW = MODELS["hope_attention-tiny"]
FIT = importlib.import_module("hope_jax.train.fit")  # the package has the function under this name
# Quick to compile, with two levels: one moves every batch, one every third.
SMALL = dataclasses.replace(
    ROW,
    width=32,
    mixer=dataclasses.replace(ROW.mixer, heads=2),
    feed_forward=dataclasses.replace(ROW.feed_forward, hidden=48, levels=(Level(64), Level(192))),
)
FLAGS = ["--model", "small", "--batch", "2", "--length", "32", "--save-every", "2", "--eval-every", "3"]
FLAGS += ["--steps", "6", "--eval-batches", "1", "--sample-tokens", "8", "--no-compile-cache"]


@pytest.fixture(scope="module", autouse=True)
def rows():
    """A small model, known to the command line by name; commands of the same configuration share their programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "small", SMALL)
        patch.setattr(training, "text_setup", setups_made_once(training.text_setup))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of text files that is quick to read and has something to learn."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        lines = (f"{i} times {j} is {i * j}, and {j} times {i} is {j * i}." for j in range(60))
        (folder / f"{i}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def command(text):
    """``command(run, *flags)``: the arguments of a training run of six steps on the text."""
    return lambda run, *flags: ["pretrain", "--run", str(run), *FLAGS, "--data.path", str(text), *flags]


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """The run folder of six steps without interruption, to be looked at only."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert main(command(run)) == 0
    return run


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def stop_at(step, number):
    """The Monitor, sending this process a signal when it has seen ``step``."""

    class Monitor(FIT.Monitor):
        def train(self, done, metrics):
            super().train(done, metrics)
            if done == step:
                os.kill(os.getpid(), number)

    return Monitor


def logged(run):
    """The metrics of a run but for the clock's."""
    rows = training.read_rows(run / "metrics.jsonl")
    rows = [{name: value for name, value in row.items() if name not in training.TIMED} for row in rows]
    return sorted(rows, key=lambda row: (row["step"], row["split"]))


def assert_same_run(left, right, step):
    """Parameters, optimizer state, data position and everything logged are equal, bit for bit."""
    a, b = training.read_manifest(left, step), training.read_manifest(right, step)
    assert a.arrays == b.arrays and len(a.arrays) > 10 and a.data == b.data
    assert logged(left) == logged(right)


def flip_a_bit(run, step):
    """Flip one bit in the largest file of a saved step."""
    path = max((run / "checkpoints" / str(step)).rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else -1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def mistake(capfd, arguments):
    """Run a command or experiment that must fail as a user's mistake; returns its one sentence."""
    capfd.readouterr()
    program = experiments.main if arguments[0] in experiments.EXPERIMENTS else main
    assert program(arguments) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error and "╭" not in error and "-----" not in error, "one plain sentence, no frame"
    return error.strip().splitlines()[-1]


def test_six_steps_are_three_then_a_stop_then_three_more_bit_for_bit(command, finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(FIT, "Monitor", stop_at(2, signal.SIGTERM))
        assert main(command(run)) == 143
    assert training.saved_steps(run) == [2, 3]
    assert main(command(run, "--sample-tokens", "0")) == 0
    assert_same_run(run, finished, 6)


INTERRUPTED = """
import signal, sys
sys.path[:0] = [".", "tests"]
import test_cli
from hope_jax.cli.main import main
test_cli.MODELS["small"] = test_cli.SMALL
test_cli.FIT.Monitor = test_cli.stop_at(3, signal.SIGINT)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ctrl_c_in_another_process_saves_prints_how_to_go_on_and_the_rerun_equals_no_interruption(
    command, finished, heard, tmp_path
):
    run = tmp_path / "run"
    arguments = command(run)
    script = [sys.executable, "-c", INTERRUPTED, *arguments]
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}  # what ``finished`` compiled
    where = {"cwd": Path(__file__).parent.parent, "env": {**os.environ, **cache}}
    done = subprocess.run(script, **where, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr and "Stopping after this step" in done.stderr
    assert "Stopped at step 4 of 6" in done.stdout
    assert f"-m hope_jax pretrain --run {run}" in done.stdout.strip().splitlines()[-1]
    assert main(arguments) == 0
    assert_same_run(run, finished, 6)


def test_a_finished_run_has_its_curve_sample_and_logs_and_says_what_it_reached(command, finished, capsys):
    held = [row for row in logged(finished) if row["split"] == "heldout"]
    assert sorted(row["step"] for row in held) == [0, 3, 6]
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "times" in (finished / "sample.txt").read_text()
    assert list((finished / "tensorboard").iterdir())
    assert main(command(finished)) == 0
    output = capsys.readouterr().out
    assert "has finished its 6 steps" in output
    first, last = (next(row["bits_per_byte"] for row in held if row["step"] == step) for step in (0, 6))
    assert f"held-out bits per byte: {first:.3f} before -> {last:.3f}" in output


def test_more_steps_and_other_flags_of_operation_go_on_and_the_learning_rate_is_told(command, copied, capsys):
    others = "--save-every 1 --save-minutes 9 --keep 2 --keep-every 4 --eval-every 4 --most-skipped 1 --spike 50"
    assert main(command(copied, "--steps", "8", "--sample-tokens", "0", *others.split())) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "planned for 6 steps" in line)
    rates = {row["step"]: row["learning_rate"] for row in logged(copied) if row["split"] == "train"}
    assert list(rates) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert load_config(copied).spike == 50 and training.saved_steps(copied) == [4, 7, 8]
    assert f"goes on at {rates[7]:.2e} instead of" in line


def test_fewer_steps_than_done_is_refused(command, finished, capfd):
    assert "at step 6 already" in mistake(capfd, command(finished, "--steps", "5"))


def test_a_flipped_bit_in_the_latest_step_is_named_and_the_run_goes_on_from_the_step_before(
    command, finished, copied, capfd
):
    flip_a_bit(copied, 6)
    assert "digest. Leave out --resume-from" in mistake(capfd, command(copied, "--resume-from", "6"))
    assert main(command(copied, "--sample-tokens", "0")) == 0
    said = capfd.readouterr()
    assert "It is skipped." in said.err and "from step 4 of 6" in said.out and (copied / "set_aside" / "6").is_dir()
    assert_same_run(copied, finished, 6)


def test_a_missing_step_to_resume_from_is_answered_with_those_that_exist(command, finished, capfd):
    message = mistake(capfd, command(finished, "--resume-from", "5"))
    assert "no saved step 5" in message and "[2, 4, 6]" in message


def test_nan_stops_with_the_step_named_and_the_last_good_step_intact(command, finished, tmp_path, capfd, monkeypatch):
    run = tmp_path / "run"
    real = vars(training.Setup)["step"]

    def poisoned(setup):
        def step(state, batch):
            if int(state.step) == 4:
                state = state.replace(params=jax.tree.map(lambda p: p * jnp.nan, state.params))
            return real.__get__(setup)(state, batch)

        return step

    monkeypatch.setattr(training.Setup, "step", property(poisoned))
    message = mistake(capfd, command(run))
    assert "step 5: the parameter norm became nan" in message and "lower --optimizer.learning-rate" in message
    assert training.saved_steps(run) == [2, 4]
    saved, expected = (training.read_manifest(folder, 4) for folder in (run, finished))
    assert saved.arrays == expected.arrays and saved.data == expected.data


@pytest.mark.slow
def test_a_learning_rate_that_blows_up_ends_with_a_sentence_not_with_a_saved_nan(command, tmp_path, capfd):
    message = mistake(capfd, command(tmp_path / "run", "--optimizer.learning-rate", "1e38"))
    assert "Training stopped at step" in message and "--optimizer.learning-rate" in message
    assert training.saved_steps(tmp_path / "run") == []


def test_a_run_of_another_configuration_is_refused_with_the_fields_that_differ(command, finished, capfd):
    other = ["--batch", "4", "--optimizer.b2", "0.5"]
    message = mistake(capfd, command(finished, *other))
    assert "batch is 2 there and 4 here" in message and "optimizer.method.b2 is 0.95 there and 0.5 here" in message
    assert "model" not in message.split("belongs to")[1]


def test_another_text_is_another_run_but_another_path_to_it_is_not(command, finished, text, tmp_path, capfd):
    moved = Path(shutil.copytree(text, tmp_path / "moved"))
    assert main(command(finished, "--data.path", str(moved))) == 0
    (moved / "3.txt").write_text("something else entirely\n" * 100)
    assert "text_fingerprint is" in mistake(capfd, command(finished, "--data.path", str(moved)))


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--model", "hope-tinny"], "no model is called 'hope-tinny'; did you mean 'hope-tiny'"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--keep", "1"], "--keep must be at least 2, got 1"),
        (["--accumulate", "3"], "--accumulate must divide --batch, got 3 for 2"),
        (["--remat-every", "5"], "--remat-every must divide --length, got 5 for 32"),
        (["--optimizer.clip", "0"], "clip is 0; expected above 0"),
        (["--length", "1000000"], "1000000"),
        (["--data.path", "/does/not/exist"], "/does/not/exist"),
        (["--run", os.devnull], "cannot be written"),
        (["--stepz", "3"], "There is no flag --stepz; did you mean '--steps'"),
        (["--optimizer.learning_rte=3"], "did you mean '--optimizer.learning-rate'"),
        (["--no-compile-cach"], "did you mean '--no-compile-cache'"),
        (["--steps", "many"], "'many' is no whole number; expected --steps INT; see python -m hope_jax pretrain"),
        (["--steps"], "Missing value for argument '--steps'"),
        (["--dtype", "float8"], "'float8' for argument '--dtype'; expected one of ("),
        (["--steps", "3", "4"], "Unrecognized options: 4"),
    ],
)
def test_a_mistake_is_one_plain_sentence_and_exit_status_2(flags, expected, command, tmp_path, capfd):
    assert expected in mistake(capfd, command(tmp_path / "run", *flags))


def test_a_run_without_a_folder_is_told_which_flag_is_missing(capfd):
    assert mistake(capfd, ["pretrain"]).startswith("The flag --run is missing")
    assert "There is no flag --rum; did you mean '--run'" in mistake(capfd, ["pretrain", "--rum", "x"])


def test_a_disk_that_fills_up_while_training_is_one_sentence(command, tmp_path, capfd):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    (run / "metrics.part").symlink_to("/dev/full")
    assert "No space left on device" in mistake(capfd, command(run))


@pytest.mark.slow
def test_a_tokenizer_bfloat16_and_accumulation_train_together(command, bpe, tmp_path):
    flags = ["--data.tokenizer", str(bpe), "--dtype", "bfloat16", "--accumulate", "2", "--sample-tokens", "0"]
    assert main(command(tmp_path / "run", *flags, "--length", "16", "--eval-every", "6")) == 0
    model = load_run(tmp_path / "run").model.config
    assert model.dtype == jnp.bfloat16 and model.vocab_size > 256
    losses = [row["loss"] for row in logged(tmp_path / "run") if row["split"] == "train"]
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_the_command_to_go_on_drops_resume_from():
    assert without(["--resume-from", "4", "--steps", "6", "--resume_from=3"], "--resume-from") == ["--steps", "6"]


def test_the_default_run_needs_no_flags_but_the_folder():
    config = parse(pretrain.PretrainConfig, ["--run", "x"], "python -m hope_jax pretrain")
    assert config.model in MODELS and config.data.path == ()
