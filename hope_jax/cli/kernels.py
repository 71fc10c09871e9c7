"""What the memories of one layer cost: time, arithmetic, memory, launches, by how they are computed.

    python -m hope_jax kernels                                           # on this machine
    python -m hope_jax kernels --impls pallas --compile-for v5e:2x2      # for a TPU that you do not have: nothing runs

Each row is the gradient of one mixer in float32, written to ``kernels.jsonl``: kernels that it starts, rounds of all
loops, temporary megabytes, seconds to compile; on this machine also milliseconds forward and with the backward pass,
the best of ``--repeats`` interleaved repetitions, and model FLOP/s. Half a minute on a CPU for each row of a shape.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hope_jax.cli.checks import at_least, given
from hope_jax.cli.measuring import best_seconds, report
from hope_jax.cli.parse import parse
from hope_jax.cli.results import Row, open_results
from hope_jax.errors import UserError
from hope_jax.memory import RULES
from hope_jax.memory.kernels import Impl
from hope_jax.nn.mixers.memory import MemoryMixerConfig
from hope_jax.nn.mixers.self_modifying import SelfModifyingConfig
from hope_jax.train.compile import topology
from hope_jax.train.devices import shape_at
from hope_jax.train.flops import PASSES, forward_flops
from hope_jax.train.work import work

KERNEL = "tpu_custom_call"  # what XLA calls a kernel of a TPU


@dataclass(frozen=True)
class KernelsConfig:
    """Measure the memories of one layer, every combination of what is given."""

    memories: tuple[Literal["hope", "titans"], ...] = ("hope",)  # Mixers: self-modifying memories, one MLP memory.
    impls: tuple[Impl, ...] = ("auto", "chunked")  # How they are computed; pallas is slow but on a TPU.
    chunks: tuple[int, ...] = (16, 64)  # Tokens of a chunk: the anchor periods.
    head_sizes: tuple[int, ...] = (64,)  # Features of a head.
    heads: int = 12  # Heads of the mixer.
    lengths: tuple[int, ...] = (2048,)  # Tokens per sequence, multiples of every chunk.
    batch: int = 2  # Sequences.
    compile_for: str | None = None  # Compile for the first chip of this topology, such as v5e:2x2, and run nothing.
    repeats: int = 5  # Repetitions; the best counts.
    results: Path = Path("experiments/results")  # Folder of kernels.jsonl.

    def __post_init__(self):
        given(self, "memories", "impls", "chunks", "head_sizes", "lengths")
        at_least(self, 1, "chunks", "head_sizes", "heads", "lengths", "batch", "repeats")
        for length, chunk in itertools.product(self.lengths, self.chunks):
            if length % chunk:
                raise UserError(f"--lengths must be multiples of --chunks, got {length} for {chunk}.")


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    config = parse(KernelsConfig, arguments, "python -m hope_jax kernels")
    report(open_results(config.results, "kernels.jsonl"), measure(config))
    return 0


def measure(config: KernelsConfig) -> Iterator[Row]:
    """A row for each combination; those that differ in ``impl`` alone are timed together."""
    chip = jax.devices()[0] if config.compile_for is None else topology(config.compile_for)[0]
    for memory, chunk, size, length in itertools.product(
        config.memories, config.chunks, config.head_sizes, config.lengths
    ):
        about = {"memory": memory, "chunk": chunk, "head_size": size, "length": length}
        about |= {"heads": config.heads, "batch": config.batch, "chip": chip.device_kind}
        u = jax.ShapeDtypeStruct((config.batch, length, size * config.heads), jnp.float32)
        layers: dict[Impl, _Layer] = {
            impl: _layer(_mixer(memory, config.heads, chunk, impl), u, chip) for impl in config.impls
        }
        times = {} if config.compile_for else _times(layers, u, config.repeats)
        for impl, layer in layers.items():
            yield about | {"impl": impl} | layer.row | times.get(impl, {})


class _Layer(NamedTuple):
    """The compiled forward and backward passes of a layer, the shapes of its parameters, and what is known of it."""

    forward: Any
    both: Any
    params: Any
    flops: int
    row: Row


def _mixer(memory: str, heads: int, chunk: int, impl: Impl) -> Any:
    if memory == "hope":
        return SelfModifyingConfig(heads, c_memory=chunk, c_projections=chunk, impl=impl)
    return MemoryMixerConfig(dataclasses.replace(RULES["titans"], period=chunk), heads, impl=impl)


def _layer(config: Any, u: Any, chip: Any) -> _Layer:
    mixer, mesh = config.build(u.shape[2], jnp.float32), Mesh(np.array([chip]), ("chip",))
    place = NamedSharding(mesh, PartitionSpec())

    def read(mixer: Any, u: Any) -> Any:
        return mixer(u, mixer.init_state(*u.shape[:2]))[0]

    def loss(params: Any, u: Any) -> Any:
        return jnp.sum(jnp.square(mixer.apply({"params": params}, u, method=read)))

    params = jax.eval_shape(functools.partial(mixer.init, method=read), jax.random.key(0), u)["params"]
    given = jax.tree.map(functools.partial(shape_at, place), (params, u))
    since = time.monotonic()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # it tells a kernel which chip it is for
        forward, gradient = (jax.jit(f).lower(*given) for f in (loss, jax.grad(loss, (0, 1))))
    both: Any = gradient.compile()
    seconds, done = time.monotonic() - since, work(both.as_text())
    row = {"kernels": done.calls[KERNEL], "loop_rounds": done.rounds, "compile_seconds": round(seconds, 1)}
    row |= {"temporary_mb": round(both.memory_analysis().temp_size_in_bytes / 1e6, 1)}
    return _Layer(forward, both, params, forward_flops(loss, params, u), row)


def _times(layers: dict[Impl, _Layer], u: Any, repeats: int) -> dict[str, Row]:
    """Milliseconds and model FLOP/s of each layer, of parameters drawn with a deviation of 0.05."""
    some = next(iter(layers.values()))
    drawn = jax.tree.map(lambda x: 0.05 * jax.random.normal(jax.random.key(0), x.shape), some.params)
    inputs = jax.random.normal(jax.random.key(1), u.shape)
    calls = {}
    for impl, layer in layers.items():
        calls[f"{impl} forward"] = functools.partial(layer.forward.compile(), drawn, inputs)
        calls[impl] = functools.partial(layer.both, drawn, inputs)
    seconds = best_seconds(calls, repeats)

    def row(impl: Impl, flops: int) -> Row:
        one, both = seconds[f"{impl} forward"], seconds[impl]
        speed = round(PASSES * flops / both / 1e9, 2)
        return {"forward_ms": round(1e3 * one, 2), "both_ms": round(1e3 * both, 2), "gflops": speed}

    return {impl: row(impl, layer.flops) for impl, layer in layers.items()}
