"""Compile the training step for TPUs that you do not have: bytes, FLOPs and collectives of each chip.

    python -m hope_jax compile --model hope-140m --topology v5e:4x4 --batch 32 --length 2048
    python -m hope_jax compile --model hope-tiny --topology cpu:2 --batch 4 --length 512

The first command needs ``pip install 'hope_jax[tpu]'`` and no TPU. What compiles for a TPU fits: a step that needs more
memory than a chip has is refused. Loops count as often as they run.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax import model_named
from hope_jax import train as training
from hope_jax.cli.parse import parse
from hope_jax.cli.step_flags import StepFlags
from hope_jax.errors import UserError
from hope_jax.models import with_impl
from hope_jax.train.compile import Report, compile_step, topology
from hope_jax.train.kernels import evaluated


@dataclass(frozen=True)
class CompileConfig(StepFlags):
    """Compile a training step; most flags are those of `pretrain`, and mean the same."""

    topology: str  # Chips that share each batch: a TPU such as v5e:16x16, v5p:4x4x4 or v6e:4x4; cpu:8: this machine.
    dtype: Literal["float32", "bfloat16"] = "float32"  # Of products and activations.

    def __post_init__(self):
        model = with_impl(model_named(self.model), self.impl)
        training.check_shares(self.mesh, model)
        self.check(model)


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    config = parse(CompileConfig, arguments, "python -m hope_jax compile")
    setup = _setup(config)
    windows = jax.ShapeDtypeStruct((config.batch, config.length + 1), jnp.int32)
    flops = setup.flops(windows)
    _print(_asked(config, setup, flops))
    _print(_found(compile_step(setup, windows), flops / setup.devices))
    if not config.topology.startswith("cpu:"):
        print("The step fits into the memory of a chip.")
    return 0


def _setup(config: CompileConfig) -> training.Setup:
    devices = topology(config.topology)
    mesh = config.mesh.make(config.batch // config.accumulate, devices)
    if mesh.size < len(devices):
        raise UserError(
            f"--topology {config.topology} has {len(devices)} chips; {mesh.size} of them can share {config.batch} "
            f"sequences in {config.accumulate} slices. Give a larger --batch, or other numbers of --mesh.*."
        )
    row = dataclasses.replace(model_named(config.model), dtype=jnp.dtype(config.dtype))
    run = training.TextRun(row, config.optimizer, config.batch, config.length, 0, "", "")
    return config.setup(run, 1000, np.ones(row.vocab_size), mesh)


def _asked(config: CompileConfig, setup: training.Setup, flops: int) -> dict[str, str]:
    parameters = training.count_parameters(setup.shapes().params)
    model = with_impl(model_named(config.model), config.impl)
    chip = setup.mesh.devices.flat[0] if setup.mesh else jax.devices()[0]
    return {
        "model": f"{config.model}, {parameters:,} parameters, {config.dtype}",
        "batch": f"{config.batch} x {config.length} tokens, {setup.tokens // setup.devices:,} a chip",
        "memories": evaluated(model, chip.platform),
        "kept": training.what_is_kept(model, config.remat, config.remat_every, chip.platform),
        "chips": f"{setup.devices}, {config.topology}, {chip.device_kind}",
        "model FLOPs": f"{flops / setup.tokens:.4g} per token, {flops / setup.devices:.4g} a chip and step",
    }


def _found(report: Report, flops: float) -> dict[str, str]:
    """What the compiled step needs and does, by name; ``flops``: model FLOPs of a chip."""
    done, besides = report.work, report.results - report.shared
    sums = [f"{kind} {count:,} ({done.sent[kind]:,} bytes)" for kind, count in sorted(done.collectives.items())]
    left_out = [f"{target} {count:,}" for target, count in sorted(done.calls.items())]
    left_out += [f"{done.unknown} loops of unknown length but for one round"] if done.unknown else []
    return {
        "compiled FLOPs": f"{done.flops:.4g} a chip and step, {done.flops / flops:.3f} of the model's",
        **({"not counted": ", ".join(left_out)} if left_out else {}),
        "loops": f"{done.rounds:,} rounds of all loops in a step",
        "collectives": ", ".join(sums) or "none",
        "in inner loops": ", ".join(f"{kind} {count:,}" for kind, count in sorted(done.nested.items())) or "none",
        "bytes a chip": f"{report.bytes:,}: arguments {report.arguments:,}, results besides {besides:,}, "
        f"temporaries {report.temporaries:,}, code {report.code:,}",
        "compiled in": f"{report.seconds:.0f} s",
    }


def _print(rows: dict[str, str]) -> None:
    print("\n".join(f"{name:<16}{value}" for name, value in rows.items()), flush=True)
