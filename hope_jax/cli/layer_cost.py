"""One layer in one of its forms: compiled, with what its program does, and timed."""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hope_jax.cli.measuring import best_seconds, told
from hope_jax.cli.results import Row
from hope_jax.memory import RULES
from hope_jax.memory.kernels import Impl
from hope_jax.models.titans import TITANS
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.mixers.gated_deltanet import GatedDeltaNetConfig
from hope_jax.nn.mixers.memory import MemoryMixerConfig
from hope_jax.nn.mixers.self_modifying import SelfModifyingConfig
from hope_jax.train.devices import memory_of, shape_at
from hope_jax.train.flops import PASSES, forward_flops
from hope_jax.train.work import work

KERNEL = "tpu_custom_call"  # what XLA calls a kernel of a TPU
Memory = Literal["hope", "titans", "gated_deltanet", "attention"]
CHUNKED = ("hope", "titans")  # memories whose chunks have a size that can be set


@dataclass(frozen=True)
class Shape:
    """A mixer and what it reads: ``batch`` sequences of ``length`` tokens, ``heads`` of ``head_size`` features.

    ``chunk``: tokens of an anchor period; None: a memory that has none.
    """

    memory: Memory
    chunk: int | None
    head_size: int
    length: int
    heads: int
    batch: int

    def mixer(self, impl: Impl) -> Any:
        """The configuration of the mixer."""
        if self.memory == "attention":
            return AttentionConfig(self.heads)
        if self.memory == "gated_deltanet":
            return GatedDeltaNetConfig(self.heads, self.head_size, self.head_size, impl=impl)
        if self.memory == "titans":
            rule = dataclasses.replace(RULES["titans"], period=self.chunk)
            return MemoryMixerConfig(rule, self.heads, impl=impl, **TITANS)
        period: Any = self.chunk
        return SelfModifyingConfig(self.heads, c_memory=period, c_projections=period, impl=impl)

    def forms(self, impls: Sequence[Impl]) -> Sequence[Impl]:
        """The forms to measure: ``impls``, but attention has one form alone, "auto"."""
        return ("auto",) if self.memory == "attention" else impls

    def inputs(self, dtype: Any = jnp.float32) -> Any:
        """What the layer reads, as a shape."""
        return jax.ShapeDtypeStruct((self.batch, self.length, self.heads * self.head_size), dtype)

    def layer(self, impl: Impl, dtype: Any = jnp.float32) -> "Layer":
        """The mixer, with its own parameters."""
        return Layer(self.mixer(impl).build(self.heads * self.head_size, dtype))


class Layer(NamedTuple):
    """A mixer that reads fresh sequences."""

    mixer: Any

    def read(self, params: Any, u: Any) -> Any:
        """The output, [B,T,D]."""
        return self.mixer.apply({"params": params}, u, method=_read)

    def start(self, key: Any) -> Any:
        """The initial parameters."""
        u = jnp.zeros((1, 1, self.mixer.width), self.mixer.dtype)
        return self.mixer.init(key, u, method=_read)["params"]

    def shapes(self) -> Any:
        """The shapes of the parameters."""
        return jax.eval_shape(self.start, jax.random.key(0))


def _read(mixer: Any, u: Any) -> Any:
    return mixer(u, mixer.init_state(*u.shape[:2]))[0]


class _Programs(NamedTuple):
    """The forward pass and the gradient, compiled, with the model FLOPs of the forward pass."""

    forward: Any
    both: Any
    flops: int


def costs(shape: Shape, impls: Sequence[Impl], chip: Any, repeats: int) -> Iterator[Row]:
    """What the layer costs in each form on ``chip``, a row each; they are timed together, 0 ``repeats``: not at all.

    What fails has a row, too, with the reason.
    """
    programs, rows = {}, {}
    params = shape.layer(shape.forms(impls)[0]).shapes()
    for impl in shape.forms(impls):
        row = rows[impl] = {"impl": impl}
        with told(row):
            programs[impl] = _compiled(shape, impl, chip, row)
            if repeats:
                _check_room(programs[impl].both, chip)
    failed = {impl: row for impl, row in rows.items() if "failed" in row}
    times = _times({impl: one for impl, one in programs.items() if impl not in failed}, rows, params, shape, repeats)
    for impl, row in rows.items():
        yield dataclasses.asdict(shape) | {"chip": chip.device_kind} | row | times.get(impl, {})


def _compiled(shape: Shape, impl: Impl, chip: Any, row: Row) -> _Programs:
    """Compile the programs of the layer; what is known of the gradient is added to ``row``."""
    layer, u, mesh = shape.layer(impl), shape.inputs(), Mesh(np.array([chip]), ("chip",))
    params = layer.shapes()
    place = NamedSharding(mesh, PartitionSpec())

    def loss(params: Any, u: Any) -> Any:
        return jnp.sum(jnp.square(layer.read(params, u)))

    given = jax.tree.map(functools.partial(shape_at, place), (params, u))
    since = time.monotonic()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # it tells a kernel which chip it is for
        forward, gradient = (jax.jit(f).lower(*given) for f in (loss, jax.grad(loss, (0, 1))))
    both: Any = gradient.compile()
    row |= {"compile_seconds": round(time.monotonic() - since, 1)}
    row |= {"temporary_mb": _short(both.memory_analysis().temp_size_in_bytes / 1e6)} | _counted(both.as_text())
    return _Programs(forward, both, forward_flops(loss, params, u))


def _counted(text: str) -> Row:
    """Launches, kernels, rounds of loops and megabytes moved of a program.

    A program whose text cannot be read, as of a new compiler, is timed all the same: the row then has the reason.
    """
    counted: Row = {}
    with told(counted):
        done = work(text)
        counted |= {"launches": done.launches, "kernels": done.calls[KERNEL], "loop_rounds": done.rounds}
        counted |= {"moved_mb": _short(done.moved / 1e6)}
    return {"not_counted": counted["failed"]} if "failed" in counted else counted


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _check_room(program: Any, chip: Any) -> None:
    """Raise MemoryError where a program would need more memory than there is: a CPU ends the process then."""
    memory, room = program.memory_analysis(), memory_of(chip)
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    if needed > 0.9 * room:
        raise MemoryError(f"the gradient needs {needed / 1e9:.1f} of {room / 1e9:.1f} GB")


def _times(
    programs: dict[Impl, _Programs], rows: dict[Impl, Row], shapes: Any, shape: Shape, repeats: int
) -> dict[Impl, Row]:
    """Milliseconds, model FLOP/s and bytes per second of each form, with parameters drawn with a deviation of 0.05."""
    if not repeats:
        return {}
    drawn = jax.tree.map(lambda x: 0.05 * jax.random.normal(jax.random.key(0), x.shape), shapes)
    inputs = jax.random.normal(jax.random.key(1), shape.inputs().shape)
    calls, done = {}, {}
    for impl, one in programs.items():
        with told(rows[impl]):
            own = {f"{impl} forward": one.forward.compile(), impl: one.both}
            own = {name: functools.partial(program, drawn, inputs) for name, program in own.items()}
            jax.block_until_ready([call() for call in own.values()])
            calls |= own
            done[impl] = one
    seconds = best_seconds(calls, repeats)

    def row(impl: Impl, flops: int) -> Row:
        forward, both = seconds[f"{impl} forward"], seconds[impl]
        found = {"forward_ms": 1e3 * forward, "both_ms": 1e3 * both, "gflops": PASSES * flops / both / 1e9}
        if "moved_mb" in rows[impl]:
            found["gb_per_second"] = rows[impl]["moved_mb"] / both / 1e3
        return {name: _short(value) for name, value in found.items()}

    return {impl: row(impl, one.flops) for impl, one in done.items()}
