"""A check of a device in a few minutes: whether its numbers are right, what layers cost, how fast models train.

Each part yields rows. On a CPU, or with ``toy``, all shapes are tiny. ``watched.py`` runs the parts one by one, so that
one that fails or takes too long does not stop the others.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax import ModelConfig, model_named
from hope_jax import train as training
from hope_jax.cli.checks import at_least, given
from hope_jax.cli.device_processes import GRAPHS, on_cpu
from hope_jax.cli.exactness import errors
from hope_jax.cli.layer_cost import Memory, Shape, costs
from hope_jax.cli.measuring import did_not_fit, told
from hope_jax.cli.results import Row
from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.memory.kernels import Impl, runs_kernel
from hope_jax.models import ARCHITECTURES, Size
from hope_jax.train.compile import Report, compiled_step
from hope_jax.train.devices import memory_of
from hope_jax.train.flops import peak_flops

Part = Literal[
    "exactness", "hope-2048", "transformer_pp-2048", "kernels", "graphs", "hope-16384", "transformer_pp-16384"
]  # the most telling first
WEIGHTS: dict[str, float] = {"exactness": 1.5, "hope-2048": 3.0, "kernels": 2.0, "hope-16384": 3.0}
"""Part -> its share of the time, 1 for the others. Hope takes longest to compile."""
TOLERANCE = {"": 2e-4, "bfloat16_3x": 2e-3, "bfloat16": 0.2}
"""Products of a form -> the largest error of reads and gradients that counts as right."""
STEPS, SECONDS = 10, 15.0  # of a measured run: its most steps; no step begins after so many seconds
SHARE = 0.9  # of the memory of a device that a step may fill
FIRST_TOKENS = 32_768  # of the first batch that is tried


@dataclass(frozen=True)
class GpuCheckConfig:
    """Check numbers and speed of the accelerator of this machine; on a CPU everything is tiny."""

    parts: tuple[Part, ...] = get_args(Part)  # What to do, in this order.
    minutes: float = 8.0  # What is not done by then is left out.
    toy: bool = False  # Tiny shapes, as on a CPU.
    here: bool = False  # Do the parts in this process, without limits. Each process that is started has this flag.
    results: Path = Path("experiments/results")  # Folder of gpu_check.jsonl and gpu_check.md.
    cache: Path = Path("runs/.cache")  # Folder of compiled programs.

    def __post_init__(self) -> None:
        given(self, "parts")
        at_least(self, 0, "minutes")
        alone = self.parts == ("graphs",) and GRAPHS in os.environ.get("XLA_FLAGS", "")
        if self.here and "graphs" in self.parts and not alone:
            raise UserError(
                "With --here all parts share a process, and graphs needs one of its own that is started with "
                f"XLA_FLAGS={GRAPHS}: leave out --here."
            )

    def rows(self, part: Part) -> Iterator[Row]:
        """Do one part in this process."""
        toy = self.toy or on_cpu()
        if part in ("kernels", "graphs"):
            return layers(toy, LAYERS[:2] if part == "graphs" else LAYERS[:6] if toy else LAYERS)
        training.keep_programs(self.cache)
        if part == "exactness":
            return exactness(toy)
        architecture, length = part.split("-")
        return speed(architecture, int(length), toy)


def exactness(toy: bool) -> Iterator[Row]:
    """First the forms that train; then Hope with products in three passes, and all forms of a matrix memory."""
    platform = jax.default_backend()
    forms = [impl for impl in get_args(Impl) if not runs_kernel(impl) or platform == "tpu" or toy]
    others = [impl for impl in forms if impl != "auto"]
    of_hope: list[Impl] = ["chunked_bfloat16_3x", *(["pallas"] if platform == "tpu" else [])]
    trained: dict[Memory, list[Impl]] = {"hope": ["auto"], "titans": ["auto"], "gated_deltanet": ["auto"]}
    more: dict[Memory, list[Impl]] = {"hope": of_hope, "gated_deltanet": others}
    pairs = [*trained.items(), *more.items()]
    cases: list[tuple[Memory, Impl]] = [(memory, impl) for memory, impls in pairs for impl in impls]
    for memory, impl in cases:
        row: Row = {"memory": memory, "impl": impl}
        with told(row):
            row |= errors(_shape(memory, 16, 16 if toy else 64, 64 if toy else 256, 2, 1), impl)
            limit = TOLERANCE[impl.partition("_")[2]]
            row["right"] = bool(row["reads"] < limit and row["gradients"] < limit)  # NaN is wrong
        yield row


NARROW: tuple[Impl, ...] = ("chunked_bfloat16_3x", "chunked_bfloat16")
LAYERS: list[tuple[Memory, int, int, tuple[Impl, ...]]] = [
    ("hope", 64, 64, ("auto",)),
    ("hope", 16, 64, ("auto",)),
    ("attention", 64, 64, ("auto",)),
    ("gated_deltanet", 64, 64, ("auto",)),
    ("titans", 16, 64, ("auto",)),
    ("hope", 64, 32, ("auto",)),
    ("hope", 64, 64, NARROW),
]
"""Memory, tokens of a chunk, features of a head and forms of the layers that are measured, the most telling first."""


def layers(toy: bool, cases: Sequence[tuple[Memory, int, int, tuple[Impl, ...]]]) -> Iterator[Row]:
    """The costs of these layers, each in the form that trains; one of Hope also with products in bfloat16."""
    for memory, chunk, size, forms in cases:
        shape = _shape(memory, chunk // 8, size // 8, 32, 2, 1) if toy else _shape(memory, chunk, size, 2048, 12, 8)
        yield from costs(shape, forms, jax.devices()[0], 1 if toy else 10)


def _shape(memory: Memory, chunk: int, size: int, length: int, heads: int, batch: int) -> Shape:
    return Shape(memory, chunk if memory in ("hope", "titans") else None, size, length, heads, batch)


def speed(architecture: str, length: int, toy: bool) -> Iterator[Row]:
    """Training in bfloat16: tokens per second and utilisation, at a first batch and at the largest 2^n that fits.

    A step that lacks memory although it should fit is tried with half the batch. A row of its own has what is known
    before the first step.
    """
    if toy:
        length, model = length // 128, ARCHITECTURES[architecture](Size(32, 1, 2, 64, 128, (Level(16),)))
    else:
        model = dataclasses.replace(model_named(f"{architecture}-140m"), context=length)
    model = dataclasses.replace(model, dtype=jnp.bfloat16)
    room, batch = SHARE * memory_of(jax.devices()[0]), 2 if toy else FIRST_TOKENS // length
    tried: set[int] = set()
    while batch and batch not in tried:
        tried.add(batch)
        row = {"model": architecture, "length": length, "batch": batch}
        batch //= 2
        with told(row):
            one = _compiled(model, row)
            if one.report.bytes <= room:
                yield dict(row)
                row |= one.speed()
            else:
                row["failed"] = f"the step does not fit into {room / 1e9:.1f} GB"
            batch = 0 if toy else most_that_fit(row["batch"], one.report, room)
        if "failed" in row and not did_not_fit(row):
            batch = 0
        yield row


class _Compiled(NamedTuple):
    """The step of a run, and what is known of it."""

    run: training.TextRun
    setup: training.Setup
    step: Any
    report: Report

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of a batch of tokens."""
        return self.run.batch, self.run.length + 1

    def speed(self) -> Row:
        """Take some steps; returns how fast they are."""
        seconds, steps = _timed(self.step, self.setup, self.shape, self.run.model.vocab_size)
        peak = peak_flops(jax.devices()[0].device_kind)
        speed = self.setup.flops(jax.ShapeDtypeStruct(self.shape, jnp.int32)) / seconds
        row = {"step_ms": round(1e3 * seconds, 1), "steps": steps, "tflops": round(speed / 1e12, 3)}
        row |= {"tokens_per_second": round(self.run.batch * self.run.length / seconds)}
        return row | {"mfu": None if peak is None else round(speed / peak, 4)}


def _compiled(model: ModelConfig, row: Row) -> _Compiled:
    """Compile the step of ``row``, which tells how long that took and what memory it needs."""
    batch, length = row["batch"], row["length"]
    run = training.TextRun(model, training.OptimizerConfig(), batch, length, 0, "", "")
    mesh = training.MeshConfig(1).make(batch, jax.devices()[:1])
    setup = training.text_setup(run, 1000, np.ones(model.vocab_size), mesh=mesh)
    step, report = compiled_step(setup, jax.ShapeDtypeStruct((batch, length + 1), jnp.int32))
    row |= {"compile_seconds": round(report.seconds, 1), "gb": round(report.bytes / 1e9, 2)}
    return _Compiled(run, setup, step, report)


def _timed(step: Callable[..., Any], setup: training.Setup, shape: tuple[int, ...], vocab: int) -> tuple[float, int]:
    """The median seconds of the steps after the first, and how many these were.

    Where the first step takes all the time there are no others: the seconds are then its own, with all that is done
    only once.
    """
    state = setup.start(0)
    batch = setup.place(np.random.default_rng(0).integers(vocab, size=shape).astype(np.int32))
    times: list[float] = []
    since = time.monotonic()
    for _ in range(1 + STEPS):
        begun = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch))
        times.append(time.perf_counter() - begun)
        if time.monotonic() - since > SECONDS:
            break
    return statistics.median(times[1:] or times), len(times) - 1


def most_that_fit(batch: int, report: Report, room: float) -> int:
    """The largest power of 2 whose step fits, as far as ``report`` of ``batch`` tells: temporaries grow with it."""
    fixed, each = report.bytes - report.temporaries, report.temporaries / batch
    most = int((room - fixed) / each)
    return 1 << (max(1, most).bit_length() - 1)
