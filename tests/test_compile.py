"""Compiling a step for devices: the same path for this machine's and for those that are not there."""

import re
import sys
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_cli import mistake

from hope_jax import train as training
from hope_jax.cli.main import main
from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.models import ARCHITECTURES, MODELS, LanguageModel, Size
from hope_jax.train import compile as compiling
from hope_jax.train.compile import compile_step, topology
from hope_jax.train.work import work

NANO = ARCHITECTURES["transformer_pp"](Size(32, 3, 2, 64, 64, (Level(32),)))
ASKED = ["compile", "--model", "nano", "--batch", "4", "--length", "32"]


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    """A model that compiles in no time."""
    monkeypatch.setitem(MODELS, "nano", NANO)


def test_a_compiled_program_counts_its_loops_and_the_sums_of_its_devices():
    """Seven rounds of a product on two devices and of its gradient, with the sum of the gradient over the devices."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def loss(w, x):
        return jnp.sum(jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=7)[0])

    shapes = [jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=whole)]
    shapes += [jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=place)]
    compiled = jax.jit(jax.grad(loss), out_shardings=whole).lower(*shapes).compile()
    found = work(compiled.as_text())
    assert found.flops == 3 * 7 * 2 * 4 * 16 * 16
    assert found.collectives == {"all-reduce": 7} and found.sent == {"all-reduce": 7 * 4 * 16 * 16}
    assert found.unknown == 0


def test_the_command_compiles_the_step_and_says_what_each_chip_needs(capsys):
    assert main([*ASKED, "--topology", "cpu:2"]) == 0
    shown = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    count = training.count_parameters(training.abstract_params(LanguageModel(NANO)))
    assert shown["model"] == f"nano, {count:,} parameters, float32" and shown["batch"] == "4 x 32 tokens, 64 a chip"
    per_token = 6 * (count - 7 * 32) + 3 * 3 * 4 * 32 * 32  # of a block with all keys, whatever is masked
    assert shown["model FLOPs"].startswith(f"{per_token:.4g} per token, {64 * per_token:.4g} a chip")
    assert shown["compiled FLOPs"].startswith(f"{64 * per_token:.4g} a chip and step, 1.000 of the model's")
    assert "all-reduce" in shown["collectives"] and "not counted" not in shown
    assert shown["memories"] == "none" and re.fullmatch(r"\d+ rounds of all loops in a step", shown["loops"])
    parts = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", shown["bytes a chip"])]
    assert parts[0] == sum(parts[1:]) and 12 * count <= parts[1] < 12 * count + 4096


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], "The flag --topology is missing"),
        (["--topology", "cpu:3"], "--topology cpu:3 has 3 chips; 2 of them can share 4 sequences in 1 slices."),
        (["--topology", "cpu:2", "--mesh.fsdp", "3"], "mesh.fsdp is 3; give a divisor of the model's width, 32"),
        (["--topology", "cpu:99"], "--topology is cpu:99; this process has 8 CPU devices."),
        (["--topology", "cpu:2", "--model", "hope-tinny"], "no model is called 'hope-tinny'; did you mean 'hope-tiny'"),
        (["--topology", "cpu:2", "--remat-every", "5"], "--remat-every must divide --length, got 5 for 32"),
        (
            ["--topology", "cpu:2", "--impl", "pallas"],
            "impl is 'pallas', of memories; the mixers are Attention",
        ),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence(flags, expected, capfd):
    assert expected in mistake(capfd, [*ASKED, *flags])


def test_without_libtpu_the_extra_is_named(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    said = mistake(capfd, [*ASKED, "--topology", "v5e:2x2"])
    assert said.endswith("'libtpu' is not installed; it comes with the extra [tpu]: pip install 'hope_jax[tpu]'")


@pytest.fixture
def pretended(monkeypatch):
    """A process that has libtpu; its environment is put back."""
    monkeypatch.setitem(sys.modules, "libtpu", ModuleType("libtpu"))
    for name in compiling.ALONE:
        monkeypatch.setenv(name, "")


def test_a_topology_that_does_not_exist_is_named_with_what_the_compiler_says(pretended, monkeypatch):
    def refuse(**asked):
        raise jax.errors.JaxRuntimeError(
            f"INVALID_ARGUMENT: Invalid TPU external name: {asked['topology_name']}\n trace"
        )

    monkeypatch.setattr(compiling.topologies, "get_topology_desc", refuse)
    with pytest.raises(UserError, match="'v9z:4x4'; give one such as v5e:4x4, .* says: .* external name: v9z:4x4$"):
        topology("v9z:4x4")


REFUSALS = (
    "Ran out of memory in memory space hbm. Used 29.61G of 15.75G hbm. Exceeded hbm capacity by 13.86G.",
    "the total memory required for HLO temporaries (29.61G) exceeds available HBM (15.75G). HLO module: jit_step.",
)


@pytest.mark.parametrize("refusal", REFUSALS, ids=["libtpu 0.0.42", "libtpu 0.0.50"])
def test_a_step_that_does_not_fit_is_told_what_it_needs(refusal, monkeypatch):
    def refuse(setup, batch):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {refusal}")

    monkeypatch.setattr(training.Setup, "lower", refuse)
    setup = training.Setup(dict, optax.l2_loss, optax.sgd(1.0), optax.constant_schedule(1.0))
    with pytest.raises(UserError, match="needs 29.61G of the 15.75G bytes of a chip's memory; give a smaller"):
        compile_step(setup, None)


def test_another_refusal_of_the_compiler_is_not_taken_for_a_lack_of_memory(monkeypatch):
    said = "Ran out of memory in memory space vmem. Used 20.51M of 16.00M vmem."

    def refuse(setup, batch):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(training.Setup, "lower", refuse)
    setup = training.Setup(dict, optax.l2_loss, optax.sgd(1.0), optax.constant_schedule(1.0))
    with pytest.raises(jax.errors.JaxRuntimeError, match="memory space vmem"):
        compile_step(setup, None)


def test_a_step_compiles_for_a_tpu(capsys):
    pytest.importorskip("libtpu", reason="the compiler of TPUs comes with the extra [tpu]")
    assert main([*ASKED, "--topology", "v5e:2x2"]) == 0
    shown = capsys.readouterr().out
    assert "TPU v5 lite" in shown and "all-reduce" in shown and "fits" in shown
