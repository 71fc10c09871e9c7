"""The check of an accelerator: commands within a time, the largest batch, the page; the whole of it on a CPU."""

import json
import subprocess
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from experiments import gpu_check
from experiments.__main__ import main
from hope_jax.cli import device_check, device_processes, layer_cost
from hope_jax.cli.device_check import most_that_fit
from hope_jax.cli.device_page import page
from hope_jax.cli.kernel_table import last, losses, table
from hope_jax.cli.measuring import machine, told
from hope_jax.cli.watched import failures
from hope_jax.errors import UserError
from hope_jax.models import ARCHITECTURES, Size
from hope_jax.train.compile import Report


def test_what_fails_or_takes_too_long_is_told_and_stops_nothing(tmp_path):
    commands = {
        "hangs": ["sleep", "600"],
        "fails": ["sh", "-c", "echo ValueError: a reason >&2; echo more >&2; exit 3"],
        "works": ["touch", str(tmp_path / "done")],
    }
    told = dict(failures(commands, 60.0, {"hangs": 0.01}, least=0.1))
    assert told.pop("hangs").startswith("stopped after")
    assert told == {"fails": "exit status 3: ValueError: a reason"} and (tmp_path / "done").exists()
    assert dict(failures({"late": ["true"]}, 1.0)) == {"late": "left out: no time was left"}


def test_an_error_is_a_result_and_a_mistake_is_not():
    row = {}
    with told(row):
        raise RuntimeError("RESOURCE_EXHAUSTED:\n  out of memory")
    assert row == {"failed": "RuntimeError: RESOURCE_EXHAUSTED: out of memory"}
    with pytest.raises(UserError), told(row):
        raise UserError("a mistake")


@pytest.mark.parametrize(("room", "batch"), [(1000, 8), (499, 2), (10, 1)])
def test_the_largest_batch_grows_with_the_temporaries_alone(room, batch):
    report = Report(0.0, arguments=100, results=100, shared=100, temporaries=400, code=0, text="")
    assert most_that_fit(4, report, room) == batch


COST = {"chunk": 16, "head_size": 64, "length": 2048, "heads": 12, "batch": 2, "chip": "H1", "temporary_mb": 8.0}
ATTENTION = COST | {"memory": "attention", "chunk": None, "impl": "auto", "both_ms": 2.0}


def test_a_program_that_cannot_be_read_is_timed_all_the_same(monkeypatch):
    monkeypatch.setattr(layer_cost, "work", {}.__getitem__)
    shape = layer_cost.Shape("attention", None, 8, 8, 1, 1)
    (row,) = layer_cost.costs(shape, ("auto",), jax.devices()[0], 1)
    assert row["both_ms"] > 0 and "failed" not in row and "KeyError" in row["not_counted"]
    label = "was not counted: attention (auto), 1 x 8 tokens, heads of 8: KeyError"
    assert [line[: len(label)] for line in table([{"rows": [row]}]) if "KeyError" in line] == [label]
    text = page([row | {"part": "kernels"}])
    assert "**What was not counted**" in text and "**What failed**" not in text


def test_the_titans_that_is_measured_is_that_of_the_models():
    """With other bounds of its rate it grows without end: NaN after some hundred random tokens."""
    of_model: Any = ARCHITECTURES["titans"](Size(64, 1, 2, 16, 64, ())).mixer
    assert layer_cost.Shape("titans", of_model.rule.period, 32, 64, 2, 1).mixer("auto") == of_model


def test_a_card_that_jax_does_not_see_is_told_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(device_processes, "CARD", tmp_path)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(UserError, match="has an NVIDIA card, and JAX does not see it"):
        device_check.GpuCheckConfig().rows("kernels")
    monkeypatch.setattr(device_processes.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="cpu\n"))
    monkeypatch.setattr(gpu_check, "failures", None)  # no part starts
    assert main(["gpu_check", "--results", str(tmp_path)]) == 2
    assert "has an NVIDIA card, and JAX does not see it" in " ".join(capfd.readouterr().err.split())
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert device_processes.on_cpu()
    device_processes.check_card()


def test_graphs_are_a_process_whose_xla_is_told_as_it_starts(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    show = ["sh", "-c", "echo $XLA_FLAGS"]
    begins = [device_processes.variables(part) for part in ("graphs", "kernels")]
    told = [subprocess.check_output([*begin, *show], text=True).strip() for begin in begins]
    assert told == [f"--xla_dump_to=x {device_processes.GRAPHS}", "--xla_dump_to=x"]
    with pytest.raises(UserError, match="graphs needs one of its own that is started with XLA_FLAGS=--xla"):
        device_check.GpuCheckConfig(parts=("graphs",), here=True)
    monkeypatch.setenv("XLA_FLAGS", device_processes.GRAPHS)
    with pytest.raises(UserError, match="leave out --here"):
        device_check.GpuCheckConfig(parts=("graphs", "exactness"), here=True)
    assert device_check.GpuCheckConfig(parts=("graphs",), here=True).here
    assert machine()["xla_flags"] == device_processes.GRAPHS


def test_a_step_that_takes_all_the_time_is_measured_alone(untyped, monkeypatch):
    monkeypatch.setattr(device_check, "SECONDS", -1.0)
    setup = SimpleNamespace(start=lambda seed: 0, place=lambda batch: batch)
    steps = []
    seconds, counted = device_check._timed(lambda state, batch: (steps.append(batch.shape), 0), setup, (2, 3), 5)
    assert steps == [(2, 3)] and seconds > 0 and counted == 0


def test_losses_are_against_the_best_form_and_against_attention():
    hope = COST | {"memory": "hope", "impl": "auto", "both_ms": 3.0}
    slower = hope | {"impl": "chunked", "both_ms": 6.0}
    assert losses([hope, slower, ATTENTION, hope | {"length": 4096}]) == [
        "hope 16 (chunked), 2 x 2,048 tokens, heads of 64: 2.00 times the time of hope 16 (auto)",
        "hope 16 (auto), 2 x 2,048 tokens, heads of 64: 1.50 times the time of attention (auto)",
    ]
    compiled = [{name: value for name, value in row.items() if name != "both_ms"} for row in (hope, ATTENTION)]
    failed = ATTENTION | {"failed": "MemoryError: the gradient needs 90.0 of 80.0 GB"}
    assert losses([slower, failed]) == ["attention did not fit: attention (auto), 2 x 2,048 tokens, heads of 64"]
    assert last([hope, slower, hope | {"both_ms": 4.0}])[0]["both_ms"] == 4.0
    assert losses(compiled) == [] and "memory" in losses([compiled[0] | {"temporary_mb": 9.0}, compiled[1]])[0]


def test_the_page_has_the_card_every_part_and_what_failed():
    about = {"device": "H1", "jax": "1"}
    rows = [
        about | {"part": "exactness", "memory": "hope", "impl": "auto", "reads": 1e-7, "gradients": 1.0, "right": False}
    ]
    rows += [
        {"part": "kernels", **ATTENTION},
        {"part": "kernels", **COST, "memory": "titans", "impl": "auto", "failed": "no"},
    ]
    rows += [{"part": "hope-2048", "model": "hope", "length": 2048, "batch": 4, "tokens_per_second": 9, "mfu": 0.5}]
    rows[-1]["steps"] = 0
    text = page([*rows, {"part": "hope-16384", "failed": "stopped"}])
    assert text.startswith("# H1, jax 1\n")
    for line in (
        "| hope | auto | 1.0e-07 | 1.0e+00 | **wrong** |",
        "| hope | 2048 | 4 | 9 | - | 0 | 0.5 | - | - | - |",
        "* kernels titans 16 (auto), 2 x 2,048 tokens, heads of 64: no",
        "* hope-16384 : stopped",
    ):
        assert line in text.splitlines()


def test_a_check_that_is_stopped_leaves_the_page_of_what_it_found(tmp_path, monkeypatch):
    def stopped(*_):
        yield "graphs", "a reason"
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "failures", stopped)
    monkeypatch.setattr(gpu_check, "prepare_processes", lambda: None)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--results", str(tmp_path), "--cache", str(tmp_path / "cache")])
    assert "* graphs : a reason" in (tmp_path / "gpu_check.md").read_text().splitlines()


@pytest.mark.slow
def test_it_runs_on_a_cpu_with_tiny_shapes(tmp_path):
    assert main(["gpu_check", "--results", str(tmp_path), "--cache", str(tmp_path / "cache")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "failed" in row]
    exact = [row for row in rows if row["part"] == "exactness"]
    assert len(exact) == 11 and all(row["right"] for row in exact), exact
    assert [row["memory"] for row in rows if row["part"] == "kernels"].count("hope") == 3
    assert [row["memory"] for row in rows if device_processes.GRAPHS in row["xla_flags"]] == ["hope", "hope"]
    assert [row["memory"] for row in rows if row["part"] == "graphs"] == ["hope", "hope"]
    assert sum("tokens_per_second" in row for row in rows) == 4
    assert "cpu" in (tmp_path / "gpu_check.md").read_text().splitlines()[0]
