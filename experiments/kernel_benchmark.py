"""What layers with memories cost beside attention, by form and shape: time, arithmetic, bytes, launches, compile time.

    python -m experiments kernel_benchmark --lengths 2048 --head-sizes 64                  # on this machine
    python -m experiments kernel_benchmark --compile-for v5e:2x2 --impls chunked pallas    # without the chip
    python -m experiments kernel_benchmark --table                                         # all that is on file

What the numbers are: ``python -m hope_jax kernels --help``. A finished shape is a line of ``kernel_benchmark.jsonl``,
and is not done again on the same kind of device. The table ends with where a memory loses against attention, and a form
against another one of its memory. The defaults take an hour on a GPU; on a CPU give few shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from hope_jax.cli.kernel_table import table
from hope_jax.cli.kernels import KernelsConfig, measured
from hope_jax.cli.layer_cost import Memory
from hope_jax.cli.parse import parse
from hope_jax.cli.results import experiment


@dataclass(frozen=True)
class KernelBenchmarkConfig(KernelsConfig):
    """Measure layers with memories, and attention, in many shapes."""

    memories: tuple[Memory, ...] = get_args(Memory)  # Mixers, as in ``hope-jax kernels``; attention is the measure.
    head_sizes: tuple[int, ...] = (32, 64, 128)  # Features of a head.
    lengths: tuple[int, ...] = (2048, 8192, 32768)  # Tokens per sequence, multiples of every chunk.
    table: bool = False  # Measure nothing: print what is on file.
    cache: Path = Path("runs/.cache")  # Folder of the shape in progress.


def main(arguments: Sequence[str]) -> int:
    """Measure and print; returns the exit status."""
    config = parse(KernelBenchmarkConfig, arguments, "python -m experiments kernel_benchmark")
    return experiment(config, "kernel_benchmark", ("memory", "chip", "rows"), measured, table)
