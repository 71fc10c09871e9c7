"""The self-modifying mixer of Hope: memories that produce their own keys, values, rates and retention (SPEC 2).

    u -> short convolutions -> x_q, x_k, x_v (unit norm per head) -> memory/self_modifying.scan per head -> out

Every row of the published ablation (Table 6) is one field of ``SelfModifyingConfig``:

========================  ==========================================================
without DGD               ``dgd_scope="none"``
without momentum          ``momentum="none"``
without weight decay      ``retention=False``
without inner projection  ``inner_projection`` with "k" or "v" left out ("q" put in)
without CMS               the model's ``feed_forward`` (see ``cms.py``)
========================  ==========================================================
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import UserError, check_choices, whole
from hope_jax.memory import architectures, objectives
from hope_jax.memory.architectures import Architecture
from hope_jax.memory.kernels import Impl, runs_kernel
from hope_jax.memory.packing import Boxes
from hope_jax.memory.rule import DGDScope, RateForm, ReadTime, RetainTo, Rule
from hope_jax.memory.self_modifying import SelfModifying, Streams, Tuning, scan
from hope_jax.nn import layers
from hope_jax.nn.axes import Axes, conv_axes, dense_axes, memory_axes
from hope_jax.nn.mixers.memory import Found, MemoryMixerState, fresh_state, learned_start, sow_gates
from hope_jax.nn.shards import over_shards
from hope_jax.nn.tokens import by_feature
from hope_jax.types import Array, Count, Float, Stream

Projection = Literal["k", "v", "q"]
Momentum = Literal["none", "const", "gated"]
# Starts of the convolutions of queries, keys and values. A key is the token before the one whose value is stored, so a
# query of the present token asks what came after it. Queries also mix the last tokens: text is learned sooner then.
# Keys and values do not: with random taps of theirs, gradients through 1,024 tokens exploded (docs/defaults.md).
TAPS = (layers.taps_at(0, 0.5), layers.taps_at(1), layers.taps_at(0))


@dataclass(frozen=True)
class SelfModifyingConfig:
    """Defaults are those of SPEC 2, except where ``docs/defaults.md`` names others that were better in measurements.

    Attributes:
      heads: independent sets of memories; must divide the model width.
      hidden: hidden features of the main memory as a multiple of the head size.
      gate_hidden: hidden features of the memories of rate and retention, whose output is one number.
      conv: taps of the causal convolutions in front of the q, k and v streams.
      c_memory, c_projections: anchor period in tokens of the main memory, and of all others.
      inner_projection: which of "k", "v", "q" are memories; the others are static linear maps.
      objective: inner loss, ``objectives.l2`` (Eq. 93) or ``objectives.dot`` (Eq. 92).
      dgd_scope, rate_form, read, retain_to, damped: see ``memory.rule.Rule``.
      momentum: "none"; "const", a learned decay per head; "gated", a decay per token.
      retention: False keeps everything (alpha = 1).
      rate_max: bound of the inner rate; 0 switches all writes off.
      rate_bias, momentum_bias: initial gate biases, before the sigmoid.
      horizon: initial memory span in tokens, 1 - alpha = 1/horizon.
      projection_rate: initial rate of all memories but the main one, relative to it.
      memory, projection, gate: architectures of the three groups.
      shard: tokens after which all memories are set back to their starts, a multiple of both periods; None: never.
      project_queries: ask the memory in the span of its keys, see ``memory.rule.Rule``.
      impl: how the memories are evaluated, see ``memory.gated_delta``.
    """

    heads: int
    hidden: int = 1
    gate_hidden: int = 8
    conv: int = 4
    c_memory: int = 16
    c_projections: int = 16
    inner_projection: tuple[Projection, ...] = ("k", "v")
    objective: objectives.Objective = objectives.l2
    dgd_scope: DGDScope = "per_layer"
    rate_form: RateForm = "exact"
    read: ReadTime = "before"
    retain_to: RetainTo = "zero"
    momentum: Momentum = "gated"
    damped: bool = True
    retention: bool = True
    rate_max: float = 0.1
    rate_bias: float = 0.0
    momentum_bias: float = -3.0
    horizon: int = 8192
    projection_rate: float = 0.05
    memory: Architecture = architectures.residual_mlp
    projection: Architecture = architectures.projection_mlp
    gate: Architecture = architectures.mlp
    shard: int | None = None
    project_queries: bool = False
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        names = self.inner_projection
        if not set(names) <= set(get_args(Projection)) or len(set(names)) < len(names):
            raise UserError(f"inner_projection is {names}; expected a subset of ('k', 'v', 'q'), each once")
        check_choices(self)
        if self.rate_max < 0 or self.projection_rate <= 0:
            rates = f"rate_max={self.rate_max}, projection_rate={self.projection_rate}"
            raise UserError(f"rates must be positive (rate_max may be 0): {rates}")
        for name in ("heads", "hidden", "gate_hidden", "conv", "horizon"):
            whole(name, getattr(self, name), 2 if name == "horizon" else 1)
        if self.gate.residual:
            raise UserError("a gate memory has one output and cannot be residual; use architectures.mlp")
        if runs_kernel(self.impl) and self.c_memory != self.c_projections:
            periods = f"c_memory={self.c_memory} and c_projections={self.c_projections}"
            raise UserError(f"impl={self.impl!r} needs one period, but {periods}; make them equal or use impl='auto'")
        self.spec()  # checks the rest

    def spec(self) -> SelfModifying:
        """The static part of the pure function."""
        names = ("objective", "dgd_scope", "rate_form", "read", "damped", "retain_to", "shard", "project_queries")
        same = {name: getattr(self, name) for name in names}
        rule = functools.partial(Rule, momentum=self.momentum != "none", self_values=True, **same)
        groups = Boxes(
            rule(self.memory, period=self.c_memory),
            rule(self.projection, period=self.c_projections),
            rule(self.gate, period=self.c_projections),
        )
        return SelfModifying(groups, self.inner_projection, self.rate_max, self.retention)

    def build(self, width: int, dtype: DTypeLike) -> "SelfModifyingMixer":
        layers.check_heads(self.heads, width)
        return SelfModifyingMixer(self, width, dtype)


class SelfModifyingMixer(nn.Module):
    """``(u[B,T,D], state) -> (y[B,T,D], state)``. Memories compute in at least float32 whatever ``dtype`` is.

    Where the collection "intermediates" is mutable, ``rate`` and ``retention`` of every token [B,H,T] are sown there.
    """

    config: SelfModifyingConfig
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c, size = self.config, self.width // self.config.heads
        wide = layers.param_dtype(self.dtype)
        self.convs = layers.short_convs(c.conv, self.dtype, c.impl, TAPS)
        static = [n for n in "qkv" if n not in c.inner_projection]
        self.static = {n: layers.dense(self.width, self.dtype, f"project_{n}", layers.near_identity) for n in static}
        self.out = layers.HeadOutput(c.heads, self.width, True, self.dtype)
        boxes = len(c.inner_projection)
        self.initial = Boxes(
            learned_start(self, "memory", c.memory, (c.heads,), (size, size, c.hidden * size)),
            learned_start(self, "projections", c.projection, (c.heads, boxes), (size, size, size)),
            learned_start(self, "gates", c.gate, (c.heads, 2), (size, 1, c.gate_hidden)),
        )
        draws = {name: nn.initializers.constant(start) for name, start in self._constants().items()}
        constants = {name: self.param(name, draw, (c.heads,), wide) for name, draw in draws.items()}
        log_rates = Boxes(*(constants[f"log_rate_{name}"] for name in Boxes._fields))
        self.tuning = Tuning(log_rates, constants["rate_bias"], constants["retention_bias"])
        if c.momentum != "none":
            self.momentum_bias = constants["momentum_bias"]
        if c.momentum == "gated":
            self.momentum_kernel = self.param("momentum_kernel", nn.initializers.zeros, (c.heads, size), wide)

    @nn.nowrap
    def _constants(self) -> dict[str, float]:
        """Initial values of the parameters that are one number per head."""
        c = self.config
        rates = Boxes(0.0, math.log(c.projection_rate), math.log(c.projection_rate))
        constants = {f"log_rate_{name}": rate for name, rate in rates._asdict().items()}
        constants |= {"rate_bias": c.rate_bias, "retention_bias": math.log(c.horizon - 1)}
        return constants | ({"momentum_bias": c.momentum_bias} if c.momentum != "none" else {})

    @nn.nowrap
    def axes(self) -> Axes:
        c = self.config
        return {
            **{f"conv_{n}": conv_axes("embed") for n in "qkv"},
            **{f"project_{n}": dense_axes("all_heads", "all_heads") for n in "qkv" if n not in c.inner_projection},
            **memory_axes("memory", c.memory.layers),
            **memory_axes("projections", c.projection.layers, ("memories",)),
            **memory_axes("gates", c.gate.layers, ("memories",), answer="gate"),
            **dict.fromkeys(self._constants(), ("heads",)),
            **({"momentum_kernel": ("heads", "head_dim")} if c.momentum == "gated" else {}),
            "out": layers.HeadOutput(c.heads, self.width, True, self.dtype, parent=None).axes(),
        }

    def init_state(self, batch: int, capacity: int) -> MemoryMixerState:
        """A fresh sequence: every memory at its meta-learned start. ``capacity`` is for attention and unused here."""
        return fresh_state(self.convs, jax.vmap(self.config.spec().start)(self.initial), batch, self.width)

    def __call__(self, u: Stream, state: MemoryMixerState, count: Count = None) -> tuple[Stream, MemoryMixerState]:
        found, state = self.read(u, state, count)
        sow_gates(self, found)
        return self.answer(u, found.queries, found.reads), state

    def read(self, u: Stream, state: MemoryMixerState, count: Count = None) -> tuple[Found, MemoryMixerState]:
        """All but the output map: the memories are read while they are written."""
        streams, tails = self._streams(u, state.tails, count)
        spec, impl, shared = self.config.spec(), self.config.impl, (self.initial, self.tuning)

        def head(position, initial, tuning, fast, streams):
            return scan(spec, initial, tuning, fast, streams, position, impl, count)

        own = (state.fast, streams)
        fast, reading = over_shards(head, shared, own, state.position, self.config.shard, impl, count)
        queries = streams.q if reading.queries is None else reading.queries
        position = (state.position + (u.shape[1] if count is None else count)) % spec.cycle
        found = Found(queries, reading.reads, (streams.q, streams.k, streams.v), reading.gates)
        return found, MemoryMixerState(tails, fast, position)

    def answer(self, u: Stream, q: Float[Array, "B H T K"], reads: Float[Array, "B H T K"]) -> Stream:
        """The output map, of queries and reads."""
        return self.out(u, q, reads - q if self.config.memory.residual else reads)

    @layers.light
    def _streams(self, u: Stream, tails, count: Count) -> tuple[Streams, tuple[Array, ...]]:
        """Inputs of the memories per head, [B,H,T,K] and of unit norm, and the convolutions' new tails."""
        heads, u = self.config.heads, by_feature(u)
        inputs, new_tails = {"x": layers.unit_heads(u, heads)}, []
        for name, conv, tail in zip("qkv", self.convs, tails, strict=True):
            x, tail = conv(u, tail, count)
            inputs[name] = layers.unit_heads(nn.silu(x), heads)
            new_tails.append(tail)
        for name, project in self.static.items():
            merged = layers.merge_heads(inputs[name]).astype(self.dtype)
            inputs[name] = layers.unit_heads(project(merged), heads)
        return Streams(momentum_decay=self._momentum_decay(inputs["x"]), **inputs), tuple(new_tails)

    def _momentum_decay(self, x: Float[Array, "B H T K"]) -> Float[Array, "B H T"] | None:
        if self.config.momentum == "none":
            return None
        bias = self.momentum_bias[None, :, None]
        if self.config.momentum == "const":
            return jax.nn.sigmoid(jnp.broadcast_to(bias, x.shape[:-1]))
        return jax.nn.sigmoid(jnp.einsum("bhtk,hk->bht", x, self.momentum_kernel) + bias)
