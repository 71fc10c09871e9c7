"""Devices that share a batch: the numbers of one device, and nothing but gradients moves between them."""

import functools
import json
import math
import os
import subprocess
import sys
from typing import Any, cast

import jax
import numpy as np
import optax
import pytest

from hope_jax import MODELS as NAMED
from hope_jax import train as training
from hope_jax.cli import report
from hope_jax.cli.main import main
from hope_jax.levels import Level
from hope_jax.models import ARCHITECTURES, Size, with_in_context
from hope_jax.train.mesh import MESH
from hope_jax.train.sharding import model_on

SIZE = Size(width=16, layers=1, heads=2, vocab_size=32, context=32, levels=(Level(64),))
MODELS = {
    "hope": ARCHITECTURES["hope"](SIZE),
    "transformer_pp": ARCHITECTURES["transformer_pp"](SIZE),
    "levels in context": with_in_context(ARCHITECTURES["hope_attention"](SIZE), (8, 16)),
}


@pytest.mark.parametrize(
    ("name", "accumulate"),
    [
        pytest.param("hope", 1, marks=pytest.mark.slow),
        pytest.param("levels in context", 1, marks=pytest.mark.slow),
        pytest.param("transformer_pp", 1, marks=pytest.mark.slow),  # one slice is tested in test_sharding.py
        ("transformer_pp", 2),
    ],
)
def test_a_step_on_two_devices_is_the_step_on_one_and_only_sums_move_between_them(name, accumulate):
    batch = np.random.default_rng(0).integers(0, 32, (4, 33)).astype(np.int32)
    rate, ends, quick = optax.constant_schedule(1.0), [], {"xla_backend_optimization_level": 0}  # to compile
    for devices in (1, 2):
        mesh = training.MeshConfig(devices).make(4)
        model = model_on(mesh, MODELS[name])
        loss, init = training.next_token_loss(model, np.ones(32)), functools.partial(training.init_params, model)
        setup = training.Setup(init, loss, optax.sgd(1.0), rate, accumulate=accumulate, mesh=mesh, axes=model.axes())
        state, tokens = setup.start(0), setup.place(batch)
        compiled = cast(Any, setup.step).lower(state, tokens).compile(quick)
        ends.append(jax.device_get(compiled(state, tokens)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), *ends)
    program = str(compiled.as_text())
    assert "all-reduce(" in program
    assert not any(f"{name}(" in program for name in ("all-gather", "all-to-all", "collective-permute"))


SEVERAL = "--xla_force_host_platform_device_count=2"


@pytest.mark.parametrize(("flags", "count"), [("", 3), pytest.param(SEVERAL, 2, marks=pytest.mark.slow)])
def test_each_core_is_a_device_if_asked_before_anything_is_computed_and_no_flag_says_otherwise(flags, count):
    script = "from hope_jax.train.devices import split_host as split; split(3); import jax; n = jax.device_count()"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", f"{script}; split(5); print(n, jax.device_count())"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert found == f"{count} {count}\n"


def test_devices_that_a_flag_has_made_stay_as_they_are(monkeypatch):
    changed = []
    monkeypatch.setattr(jax.config, "update", lambda *setting: changed.append(setting))
    training.split_host(3)  # the tests have eight by a flag
    monkeypatch.setenv("XLA_FLAGS", "")
    training.split_host(6, 2)
    assert changed == [("jax_num_cpu_devices", 3)]


@pytest.mark.slow
def test_a_run_goes_on_on_other_devices_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(NAMED, "nano", ARCHITECTURES["transformer_pp"](Size(16, 1, 2, 256, 16, (Level(64),))))
    (tmp_path / "text.txt").write_text("".join(f"{i} times {j} is {i * j}.\n" for i in range(40) for j in range(20)))
    flags = [
        "pretrain",
        "--model",
        "nano",
        "--batch",
        "4",
        "--length",
        "16",
        "--sample-tokens",
        "4",
        "--save-every",
        "2",
    ]
    flags += ["--data.path", str(tmp_path / "text.txt"), "--eval-batches", "1", "--no-compile-cache"]
    held, sample = [], report.generate.sample

    def noted(model, params, *arguments, **how):
        held.append(jax.tree.map(lambda leaf: leaf.addressable_shards[0].data.size / leaf.size, params)["embedding"])
        return sample(model, params, *arguments, **how)

    monkeypatch.setattr(report.generate, "sample", noted)
    for steps, axes in (("2", (1, 1, 1, 1)), ("4", (1, 2, 1, 2))):
        mesh = [word for name, n in zip(MESH, axes, strict=True) for word in (f"--mesh.{name}", str(n))]
        assert main([*flags, "--run", str(tmp_path / "moved"), "--steps", steps, *mesh]) == 0
        said = capsys.readouterr().out
        assert f"{math.prod(axes)} of {jax.device_count()}" in said
    assert held == [1, 0.5]  # of the embedding, on each device that writes the sample
    assert "It was saved on 1 devices and goes on on 4: sums are rounded differently there." in said
    for steps in ("2", "4"):
        assert main([*flags, "--run", str(tmp_path / "stayed"), "--steps", steps, "--mesh.data", "1"]) == 0
    assert "was saved on" not in capsys.readouterr().out
    moved, stayed = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("moved", "stayed"))
    assert len(moved) == len(stayed)
    bits = [[json.loads(line).get("bits_per_byte") for line in lines] for lines in (moved, stayed)]
    np.testing.assert_allclose(*bits, rtol=1e-4)
