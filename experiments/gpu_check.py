"""The accelerator of this machine in eight minutes: are the numbers right, what do layers cost, how fast is training.

    python -m experiments gpu_check                     # on a CPU: the same with tiny shapes
    python -m experiments gpu_check --minutes 4 --parts exactness hope-2048

Every form of the memories against float64, token by token; layers as in ``kernel_benchmark``, two of them also with
loops as CUDA graphs; tokens per second and utilisation of hope-140m and transformer_pp-140m in bfloat16, with sequences
of 2,048 and 16,384 tokens and the largest batch that fits. Each part is a process of its own: one that fails or takes
too long is told and stops no other. Rows are added to ``gpu_check.jsonl`` as they come, with the name of the card;
``gpu_check.md`` is the page of this run. ``XLA_FLAGS=--xla_gpu_enable_triton_gemm=false`` shortens compilation.
"""

import sys
from collections.abc import Sequence

from hope_jax.cli.device_check import WEIGHTS, GpuCheckConfig
from hope_jax.cli.device_page import page
from hope_jax.cli.device_processes import prepare_processes, variables
from hope_jax.cli.measuring import report
from hope_jax.cli.parse import parse
from hope_jax.cli.results import append, open_results
from hope_jax.cli.watched import failures
from hope_jax.storage.digests import write_file
from hope_jax.train import read_rows


def main(arguments: Sequence[str]) -> int:
    """Check, and write the page; returns the exit status."""
    config = parse(GpuCheckConfig, arguments, "python -m experiments gpu_check")
    path = open_results(config.results, "gpu_check.jsonl")
    if config.here:
        for part in config.parts:
            report(path, ({"part": part} | row for row in config.rows(part)))
        return 0
    prepare_processes()
    command, before = [sys.executable, "-m", "experiments", "gpu_check", "--here"], len(read_rows(path, ("part",)))
    command += ["--results", str(config.results), "--cache", str(config.cache), *(["--toy"] * config.toy), "--parts"]
    commands = {part: [*variables(part), *command, part] for part in config.parts}
    try:
        for part, reason in failures(commands, 60 * config.minutes, WEIGHTS):
            append(path, {"part": part, "failed": reason})
    finally:  # also where somebody stops the check
        found = page(read_rows(path, ("part",))[before:])
        write_file(config.results / "gpu_check.md", found.encode())
        print(found)
    return 0
