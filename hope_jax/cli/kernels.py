"""What the memories of one layer cost: time, arithmetic, memory, launches, by how they are computed.

    python -m hope_jax kernels                                           # on this machine
    python -m hope_jax kernels --impls pallas --compile-for v5e:2x2      # for a TPU that you do not have: nothing runs

Each row is the gradient of one mixer in float32, written to ``kernels.jsonl``: instructions that it starts one by one
(launches), kernels among them, rounds of all loops, megabytes that it reads and writes and that it needs besides its
arguments, seconds to compile; on this machine also milliseconds forward and with the backward pass, the best of
``--repeats`` interleaved repetitions, model FLOP/s and bytes per second. What fails is a row with the reason. Half a
minute on a CPU for each row of a shape. ``python -m experiments kernel_benchmark`` measures many shapes.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from hope_jax.cli.checks import at_least, given
from hope_jax.cli.exactness import errors
from hope_jax.cli.layer_cost import CHUNKED, Memory, Shape, costs
from hope_jax.cli.measuring import machine, report, told
from hope_jax.cli.parse import parse
from hope_jax.cli.results import Results, Row, open_results
from hope_jax.errors import UserError
from hope_jax.memory.kernels import Impl
from hope_jax.train.compile import topology


@dataclass(frozen=True)
class KernelsConfig:
    """Measure the memories of one layer, every combination of what is given."""

    memories: tuple[Memory, ...] = ("hope",)
    """Mixers: self-modifying memories (hope), one MLP memory (titans), one matrix (gated_deltanet), attention."""
    impls: tuple[Impl, ...] = ("auto", "chunked")  # How they are computed; pallas is slow except on a TPU.
    chunks: tuple[int, ...] = (16, 64)  # Tokens of a chunk: the anchor periods of hope and titans.
    head_sizes: tuple[int, ...] = (64,)  # Features of a head.
    heads: int = 12  # Heads of the mixer.
    lengths: tuple[int, ...] = (2048,)  # Tokens per sequence, multiples of every chunk.
    batch: int = 2  # Sequences.
    compile_for: str | None = None  # Compile for the first chip of this topology, such as v5e:2x2, and run nothing.
    repeats: int = 5  # Repetitions; the best counts. 0: no times.
    exact: bool = False  # Also the distance of reads and gradients from float64, token by token; slow.
    results: Path = Path("experiments/results")  # Folder of the results, JSON lines.

    def __post_init__(self):
        given(self, "memories", "impls", "chunks", "head_sizes", "lengths")
        at_least(self, 1, "chunks", "head_sizes", "heads", "lengths", "batch")
        at_least(self, 0, "repeats")
        if self.exact and self.compile_for:
            raise UserError("--exact computes something, and --compile-for does not; leave one of them out.")
        for length, chunk in itertools.product(self.lengths, self.chunks):
            if length % chunk:
                raise UserError(f"--lengths must be multiples of --chunks, got {length} for {chunk}.")

    def shapes(self) -> Iterator[Shape]:
        """Every combination; a memory without anchors has no chunks and comes once."""
        for memory, size, length in itertools.product(self.memories, self.head_sizes, self.lengths):
            for chunk in self.chunks if memory in CHUNKED else (None,):
                yield Shape(memory, chunk, size, length, self.heads, self.batch)

    def chip(self) -> Any:
        """The device to measure, or to compile for."""
        return jax.devices()[0] if self.compile_for is None else topology(self.compile_for)[0]

    @property
    def timed(self) -> int:
        """Repetitions that are timed: none of what is only compiled."""
        return 0 if self.compile_for else self.repeats

    def about(self, shape: Shape, chip: Any) -> Row:
        """The settings by which a line on file counts as the measurement of this shape."""
        how = {"compiled": self.compile_for is not None, "repeats": self.timed, "exact": self.exact}
        return asdict(shape) | how | {"chip": chip.device_kind, "impls": list(shape.forms(self.impls))}

    def costs(self, shape: Shape, chip: Any) -> Iterator[Row]:
        """A row for each form of one combination."""
        for row in costs(shape, self.impls, chip, self.timed):
            if self.exact and "failed" not in row:
                with told(row):
                    row |= errors(shape, row["impl"])
            yield row


def measured(config: KernelsConfig, results: Results) -> None:
    """A line for each shape that is not on file for this kind of device and these flags, ``rows`` for its forms."""
    chip = config.chip()

    def work(shape: Shape, run: Any) -> Row:
        return {"rows": list(config.costs(shape, chip))} | machine()

    for shape in config.shapes():
        results.complete(config.about(shape, chip), functools.partial(work, shape))


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    config = parse(KernelsConfig, arguments, "python -m hope_jax kernels")
    path, chip = open_results(config.results, "kernels.jsonl"), config.chip()
    report(path, (row for shape in config.shapes() for row in config.costs(shape, chip)))
    return 0
