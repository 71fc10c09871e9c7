"""Speed and memory of this machine as JSON lines: ratios side by side in one process, never absolute promises.

    python -m hope_jax benchmark                      # all parts
    python -m hope_jax benchmark train --size 30m --length 1024 --batch 1
    python -m hope_jax benchmark length --remat-every 512

Each part is a function of its name here. Every number is the best of ``--repeats`` interleaved repetitions. Minutes on
a CPU. The aims: chunked is 10 times as fast as sequential or more; decoding takes equally long at every position.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from hope_jax import LanguageModel, ModelConfig, generate, model_named
from hope_jax import train as training
from hope_jax.cli.checks import at_least, given, known, must_divide
from hope_jax.cli.measuring import best_seconds, report
from hope_jax.cli.parse import parse
from hope_jax.cli.results import Row, open_results
from hope_jax.errors import UserError
from hope_jax.memory import gated_delta, products
from hope_jax.memory.kernels import Impl, cpu
from hope_jax.models import SIZES, Size, row_named
from hope_jax.train.flops import forward_flops

Part = Literal["train", "chunked", "length", "decode", "products"]
CHUNKED = ("hope", "deltanet")  # architectures whose training step is measured in both forms


@dataclass(frozen=True)
class BenchmarkConfig:
    """Measure speed and memory of this machine."""

    parts: tyro.conf.Positional[tuple[Part, ...]] = ()  # Parts to measure; none named: all of them.
    models: tuple[str, ...] = ("hope", "transformer_pp")
    """train: architectures, such as hope@64 for an anchor every 64 tokens; ratios are against the last one."""
    size: str | None = None  # train, chunked: a named size instead of width, layers and heads.
    width: int = 128  # train, chunked: model features.
    layers: int = 2  # train, chunked: blocks.
    heads: int = 4  # train, chunked: heads of the mixers.
    length: int = 512  # train: tokens per sequence.
    batch: int = 4  # train: sequences per batch.
    devices: int = 1  # train: devices that share a batch; on a CPU, cores.
    remat_every: int | None = None  # train, length: see pretrain; divides the lengths. None: all at once.
    tokens: int = 1024  # chunked: tokens of the sequence.
    lengths: tuple[int, int] = (1024, 8192)  # length: the two lengths, ascending.
    positions: tuple[int, int] = (64, 16_384)  # decode: tokens read before; the second a multiple of the first.
    model: str = "hope-tiny"  # length, decode: name of the model.
    repeats: int = 5  # Repetitions; the best counts.
    results: Path = Path("experiments/results")  # Folder of benchmark.jsonl.

    def __post_init__(self):
        at_least(self, 1, "width", "layers", "heads", "length", "batch", "devices", "tokens", "repeats")
        given(self, "models")
        must_divide("devices", self.devices, "batch", self.batch)
        if self.size is not None:
            known("size", self.size, SIZES)
        if self.positions[0] < 1 or self.positions[1] % self.positions[0]:
            raise UserError(f"--positions must be a number and a multiple of it, got {self.positions}.")
        if not 1 <= self.lengths[0] < self.lengths[1]:
            raise UserError(f"--lengths must be two numbers of tokens, ascending, got {self.lengths}.")
        totals = {"train": (self.length,), "length": self.lengths}
        for total in sum((totals[part] for part in self.chosen if part in totals), ()):
            if self.remat_every is not None and (self.remat_every < 1 or total % self.remat_every):
                raise UserError(f"--remat-every must divide every length, got {self.remat_every} for {total}.")
        model_named(self.model)
        for name in self.models:
            self.architecture(name)

    @property
    def chosen(self) -> tuple[Part, ...]:
        """The parts to measure."""
        return self.parts or get_args(Part)

    def architecture(self, name: str) -> ModelConfig:
        """The model of parts ``train`` and ``chunked`` with that name."""
        row = row_named(name)
        if self.size is not None:
            return dataclasses.replace(row(SIZES[self.size]), context=self.length)
        return row(Size(self.width, self.layers, self.heads, 256, self.length, SIZES["tiny"].levels))


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    config = parse(BenchmarkConfig, arguments, "python -m hope_jax benchmark")
    path = open_results(config.results, "benchmark.jsonl")
    training.split_host(config.devices)
    for part in config.chosen:
        report(path, ({"part": part, **row} for row in PARTS[part](config)))
    return 0


class Trainer:
    """A compiled training step with its state; calling it does one step."""

    def __init__(self, config: ModelConfig, batch: int, length: int, remat_every: int | None, devices: int = 1):
        model, mesh = LanguageModel(config), training.MeshConfig(devices).make(batch)
        loss = training.next_token_loss(model, np.ones(config.vocab_size), remat_every)
        setup = training.model_setup(model, loss, training.OptimizerConfig(), 1000, batch * length, mesh=mesh)
        tokens = jax.random.randint(jax.random.key(1), (batch, length + 1), 0, config.vocab_size)
        self.state, self.tokens, step = setup.spread(setup.start(0)), setup.place(tokens), cast(Any, setup.step)
        self.parameters = training.count_parameters(self.state.params)
        self.flops = forward_flops(step, self.state, self.tokens)
        lowered, since = step.lower(self.state, self.tokens), time.perf_counter()
        self._step = lowered.compile()
        self.compile_seconds = time.perf_counter() - since
        self.temp_bytes = self._step.memory_analysis().temp_size_in_bytes
        self._read = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens[:, :-1])[0])

    def __call__(self) -> Any:
        self.state, metrics = self._step(self.state, self.tokens)
        return metrics

    def forward(self) -> Any:
        """Logits of the batch."""
        return self._read(self.state.params, self.tokens)

    def row(self, seconds: float) -> Row:
        """The row of results for steps of so many seconds."""
        batch, window = self.tokens.shape
        shared = self.tokens.sharding.num_devices
        about = {"parameters": self.parameters, "length": window - 1, "batch": batch, "devices": shared}
        cost = {"compile_seconds": round(self.compile_seconds, 1), "temp_bytes": self.temp_bytes}
        speed = {"tokens_per_second": round(batch * (window - 1) / seconds), "step_ms": round(1e3 * seconds, 2)}
        return {**about, **speed, **cost, "gflops": round(self.flops / seconds / 1e9, 2)}


def train(config: BenchmarkConfig) -> Iterator[Row]:
    """Training step, forward pass, compile time and memory of the architectures; tokens/s against the last one's.

    The arithmetic that they reach is compared with that of a large matrix product.
    """
    of = (config.batch, config.length, config.remat_every, config.devices)
    trainers = {name: Trainer(config.architecture(name), *of) for name in config.models}
    square = jax.random.normal(jax.random.key(0), (1024, 1024))
    calls: dict[str, Callable[[], Any]] = {"peak": functools.partial(jax.jit(jnp.matmul), square, square)}
    for name, trainer in trainers.items():
        calls |= {name: trainer, f"{name} forward": trainer.forward}
    seconds = best_seconds(calls, config.repeats)
    peak = 2 * 1024**3 / seconds["peak"] / 1e9
    for name, trainer in trainers.items():
        row = {"model": name, **trainer.row(seconds[name]), "forward_ms": round(1e3 * seconds[f"{name} forward"], 2)}
        ratio = round(seconds[config.models[-1]] / seconds[name], 3)
        yield row | {"peak_gflops": round(peak, 1), "peak_share": round(row["gflops"] / peak, 3), "ratio": ratio}


def chunked(config: BenchmarkConfig) -> Iterator[Row]:
    """The recurrence with its gradient, then training steps of one sequence: chunked against token by token.

    Token by token means for the whole model: it reads pieces of one token, and each is rematerialised.
    """
    forms = {"chunked": _recurrence(config.tokens, "auto"), "sequential": _recurrence(config.tokens, "sequential")}
    yield {"what": "gated_delta", **_against_sequential(config, forms)}
    for name in CHUNKED:
        forms = {"chunked": None, "sequential": 1}
        trainers = {form: Trainer(config.architecture(name), 1, config.tokens, forms[form]) for form in forms}
        yield {"what": f"{name} training step", **_against_sequential(config, trainers)}


def _recurrence(time: int, impl: Impl) -> Callable[[], Any]:
    """Gradient of ``gated_delta`` over random tokens with unit keys, for 16 heads of 32 features."""
    heads, size = 16, 32
    of_vectors, of_rate, of_retention, of_decay, of_memory = jax.random.split(jax.random.key(0), 5)
    vectors = jax.random.normal(of_vectors, (3, heads, time, size))
    streams = tuple(vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True))
    rate, forgotten, decay = (jax.random.uniform(key, (heads, time)) for key in (of_rate, of_retention, of_decay))
    gates = {"erase": rate, "retention": 1 - 1e-3 * forgotten, "momentum_decay": 0.1 * decay}
    memory = 0.1 * jax.random.normal(of_memory, (size, size))

    def loss(memory: Any, streams: Any, gates: Any) -> Any:
        def head(streams: Any, gates: Any) -> Any:
            return gated_delta(memory, *streams, momentum=jnp.zeros_like(memory), impl=impl, **gates).reads

        return jnp.sum(jnp.square(jax.vmap(head)(streams, gates)))

    return functools.partial(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))), memory, streams, gates)


def _against_sequential(config: BenchmarkConfig, forms: Mapping[str, Callable[[], Any]]) -> Row:
    seconds = best_seconds(forms, config.repeats)
    times = {f"{form}_ms": round(1e3 * value, 2) for form, value in seconds.items()}
    return {"length": config.tokens, **times, "ratio": round(seconds["sequential"] / seconds["chunked"], 1)}


def length(config: BenchmarkConfig) -> Iterator[Row]:
    """The training step of one model with one sequence, short and long."""
    trainers = [Trainer(model_named(config.model), 1, tokens, config.remat_every) for tokens in config.lengths]
    seconds = best_seconds({str(i): trainer for i, trainer in enumerate(trainers)}, config.repeats)
    rows = [trainer.row(seconds[str(i)]) for i, trainer in enumerate(trainers)]
    for row in rows:
        yield {"model": config.model, "remat_every": config.remat_every, **row}
    short, long = rows
    growth = math.log(long["temp_bytes"] / short["temp_bytes"]) / math.log(long["length"] / short["length"])
    speed = round(long["tokens_per_second"] / short["tokens_per_second"], 3)
    ratios = {"speed_ratio": speed, "memory_exponent": round(growth, 3)}
    yield {"model": config.model, "remat_every": config.remat_every, **ratios}


def decode(config: BenchmarkConfig) -> Iterator[Row]:
    """Time per token written by ``generate`` after few and after many tokens read."""
    written, (early, late) = 64, config.positions
    architecture = model_named(config.model)
    model = LanguageModel(architecture)
    tokens = jax.random.randint(jax.random.key(1), (1, early), 0, architecture.vocab_size)
    params = jax.jit(lambda key: model.init(key, tokens[:, :1])["params"])(jax.random.key(0))
    read = jax.jit(lambda params, tokens, state: model.apply({"params": params}, tokens, state)[1])
    states = [read(params, tokens, model.init_state(params, batch=1, capacity=late + written + 1))]
    states.append(functools.reduce(lambda state, _: read(params, tokens, state), range(late // early - 1), states[0]))

    def write(state: Any) -> Any:
        how: dict[str, Any] = {"steps": written, "temperature": 0.0, "key": jax.random.key(2)}
        return generate.sample(model, params, state, tokens[:, :1], **how)[0]

    calls = {str(at): functools.partial(write, state) for at, state in zip(config.positions, states, strict=True)}
    seconds = best_seconds(calls, config.repeats)
    for at, value in seconds.items():
        row = {"model": config.model, "position": int(at), "ms_per_token": round(1e3 * value / written, 3)}
        yield row | {"tokens_per_second": round(written / value), "ratio": round(value / seconds[str(early)], 3)}


def transposed(config: BenchmarkConfig) -> Iterator[Row]:
    """256 products of small matrices: a^T b plain and as ``kernels.cpu`` does it, x W^T for W [out, in] and x W."""
    forms = (products.matmul_tn, cpu.matmul_tn, products.matmul_nt, products.matmul)
    plain, tn, nt, nn = (jax.jit(jax.vmap(product)) for product in forms)
    for rows, columns in ((16, 32), (32, 32), (64, 64)):
        a, b = jax.random.normal(jax.random.key(0), (2, 256, rows, columns))
        w = jax.random.normal(jax.random.key(1), (256, columns, columns))
        pairs = {"a^T b": (plain, tn, b), "x W^T": (nt, nn, w)}
        for product, (theirs, ours, right) in pairs.items():
            calls = {"plain": functools.partial(theirs, a, right), "ours": functools.partial(ours, a, right)}
            seconds = best_seconds(calls, 10 * config.repeats)
            times = {f"{name}_us": round(1e6 * value, 1) for name, value in seconds.items()}
            ratio = round(seconds["plain"] / seconds["ours"], 2)
            yield {"product": product, "shape": [rows, columns], **times, "ratio": ratio}


PARTS = {"train": train, "chunked": chunked, "length": length, "decode": decode, "products": transposed}
