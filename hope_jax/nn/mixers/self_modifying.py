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

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import UserError
from hope_jax.memory import architectures, objectives
from hope_jax.memory.architectures import Architecture
from hope_jax.memory.kernels import Impl, check_impl
from hope_jax.memory.packing import Boxes
from hope_jax.memory.rule import DGDScope, Fast, RateForm, ReadTime, RetainTo, Rule
from hope_jax.memory.self_modifying import SelfModifying, Streams, Tuning, scan
from hope_jax.nn.axes import Axes, conv_axes, dense_axes, memory_axes
from hope_jax.nn.layers import (
    AnswerOutput,
    dense,
    light,
    merge_heads,
    near_identity,
    over_heads,
    param_dtype,
    short_convs,
    unit_heads,
)
from hope_jax.types import Array, Count, Float, Int, Stream

Projection = Literal["k", "v", "q"]
Momentum = Literal["none", "const", "gated"]


@dataclass(frozen=True)
class SelfModifyingConfig:
    """Everything about the mixer; defaults are SPEC 2, or what ``docs/defaults.md`` says was measured better.

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
    rate_max: float = 2.0
    rate_bias: float = -2.5
    momentum_bias: float = -3.0
    horizon: int = 8192
    projection_rate: float = 0.05
    memory: Architecture = architectures.residual_mlp
    projection: Architecture = architectures.projection_mlp
    gate: Architecture = architectures.mlp
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        names = self.inner_projection
        if not set(names) <= set(get_args(Projection)) or len(set(names)) < len(names):
            raise UserError(f"inner_projection is {names}; expected a subset of ('k', 'v', 'q'), each once")
        if self.momentum not in get_args(Momentum):
            raise UserError(f"momentum is {self.momentum!r}; expected one of {get_args(Momentum)}")
        if self.rate_max < 0 or self.projection_rate <= 0:
            raise UserError(
                f"rates must be positive (rate_max may be 0): rate_max={self.rate_max}, "
                f"projection_rate={self.projection_rate}"
            )
        if min(self.heads, self.hidden, self.gate_hidden, self.conv) < 1 or self.horizon < 2:
            raise UserError("heads, hidden, gate_hidden and conv must be at least 1 and horizon at least 2")
        check_impl(self.impl)
        if self.gate.residual:
            raise UserError("a gate memory has one output and cannot be residual; use architectures.mlp")
        self.spec()  # checks the rest

    def spec(self) -> SelfModifying:
        """The pure function's static part."""

        def rule(architecture: Architecture, period: int) -> Rule:
            return Rule(
                architecture,
                self.objective,
                period=period,
                read=self.read,
                dgd_scope=self.dgd_scope,
                rate_form=self.rate_form,
                momentum=self.momentum != "none",
                damped=self.damped,
                retain_to=self.retain_to,
                self_values=True,
            )

        groups = Boxes(
            rule(self.memory, self.c_memory),
            rule(self.projection, self.c_projections),
            rule(self.gate, self.c_projections),
        )
        return SelfModifying(groups, self.inner_projection, self.rate_max, self.retention)

    def build(self, width: int, dtype: DTypeLike) -> "SelfModifyingMixer":
        """The module for a model of ``width`` features."""
        if width % self.heads:
            raise UserError(f"{self.heads} heads do not divide width {width}; choose a divisor")
        return SelfModifyingMixer(self, width, dtype)


class SelfModifyingState(NamedTuple):
    """Convolution tails of the q, k, v streams, packed fast weights [B,H,...], tokens since the last refresh."""

    tails: tuple[Array, ...]
    fast: Fast
    position: Int[Array, ""] | np.ndarray


class SelfModifyingMixer(nn.Module):
    """``(u[B,T,D], state) -> (y[B,T,D], state)``. Memories compute in at least float32 whatever ``dtype`` is.

    Where the collection "intermediates" is mutable, ``rate`` and ``retention`` of every token [B,H,T] are sown there.
    """

    config: SelfModifyingConfig
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c, size = self.config, self.width // self.config.heads
        wide = param_dtype(self.dtype)
        self.convs = short_convs(c.conv, self.dtype, c.impl)
        static = [n for n in "qkv" if n not in c.inner_projection]
        self.static = {n: dense(self.width, self.dtype, f"project_{n}", near_identity) for n in static}
        self.out = AnswerOutput(c.heads, self.width, self.dtype)
        self.initial = Boxes(
            self._initial("memory", c.memory, (), size, c.hidden * size),
            self._initial("projections", c.projection, (len(c.inner_projection),), size, size),
            self._initial("gates", c.gate, (2,), 1, c.gate_hidden),
        )
        log_rates = Boxes(0.0, math.log(c.projection_rate), math.log(c.projection_rate))
        self.tuning = Tuning(
            Boxes(*(self._constant(f"log_rate_{n}", start) for n, start in zip(Boxes._fields, log_rates, strict=True))),
            self._constant("rate_bias", c.rate_bias),
            self._constant("retention_bias", math.log(c.horizon - 1)),
        )
        if c.momentum != "none":
            self.momentum_bias = self._constant("momentum_bias", c.momentum_bias)
        if c.momentum == "gated":
            self.momentum_kernel = self.param("momentum_kernel", nn.initializers.zeros, (c.heads, size), wide)

    @nn.nowrap
    def axes(self) -> Axes:
        """See ``nn/axes.py``."""
        c = self.config
        constants = [f"log_rate_{name}" for name in Boxes._fields] + ["rate_bias", "retention_bias"]
        constants += ["momentum_bias"] if c.momentum != "none" else []
        return {
            **{f"conv_{n}": conv_axes("embed") for n in "qkv"},
            **{f"project_{n}": dense_axes("all_heads", "all_heads") for n in "qkv" if n not in c.inner_projection},
            **memory_axes("memory", c.memory.layers),
            **memory_axes("projections", c.projection.layers, ("memories",)),
            **memory_axes("gates", c.gate.layers, ("memories",), answer="gate"),
            **dict.fromkeys(constants, ("heads",)),
            **({"momentum_kernel": ("heads", "head_dim")} if c.momentum == "gated" else {}),
            "out": AnswerOutput(c.heads, self.width, self.dtype, parent=None).axes(),
        }

    def _constant(self, name: str, value: float) -> Array:
        start = nn.initializers.constant(value)
        return self.param(name, start, (self.config.heads,), param_dtype(self.dtype))

    def _initial(
        self, name: str, architecture: Architecture, stack: tuple[int, ...], value_dim: int, hidden: int
    ) -> tuple[Array, ...]:
        """Meta-learned M_box,0 of one group: per layer [H, *stack, in, out]."""
        heads, size = self.config.heads, self.width // self.config.heads

        def draw(key, layer):
            keys = jax.random.split(key, heads * math.prod(stack))
            weights = jax.vmap(lambda k: architecture.init(k, size, value_dim, hidden))(keys)[layer]
            return weights.reshape(heads, *stack, *weights.shape[1:]).astype(param_dtype(self.dtype))

        return tuple(self.param(f"start_{name}_{i}", draw, i) for i in range(architecture.layers))

    def init_state(self, batch: int, capacity: int) -> SelfModifyingState:
        """A fresh sequence: every memory at its meta-learned start. ``capacity`` is for attention and unused here."""
        del capacity
        fast = jax.vmap(self.config.spec().start)(self.initial)
        fast = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), fast)
        tails = tuple(conv.init_state(batch, self.width) for conv in self.convs)
        return SelfModifyingState(tails, fast, np.zeros((), np.int32))

    def __call__(self, u: Stream, state: SelfModifyingState, count: Count = None) -> tuple[Stream, SelfModifyingState]:
        streams, tails = self._streams(u, state.tails, count)
        spec, impl = self.config.spec(), self.config.impl

        def head(initial, tuning, fast, streams):
            return scan(spec, initial, tuning, fast, streams, state.position, impl, count)

        fast, reading = over_heads(head, (self.initial, self.tuning), (state.fast, streams), impl)
        self.sow("intermediates", "rate", reading.gates.rate)
        self.sow("intermediates", "retention", reading.gates.retention)
        queries = streams.q if reading.queries is None else reading.queries
        position = (state.position + (u.shape[1] if count is None else count)) % max(spec.periods)
        answers = reading.reads - queries if self.config.memory.residual else reading.reads
        return self.out(u, queries, answers), SelfModifyingState(tails, fast, position)

    @light
    def _streams(self, u: Stream, tails, count: Count) -> tuple[Streams, tuple[Array, ...]]:
        """Inputs of the memories per head, [B,H,T,K] and of unit norm, and the convolutions' new tails."""
        heads = self.config.heads
        inputs, new_tails = {"x": unit_heads(u, heads)}, []
        for name, conv, tail in zip("qkv", self.convs, tails, strict=True):
            x, tail = conv(u, tail, count)
            inputs[name] = unit_heads(nn.silu(x), heads)
            new_tails.append(tail)
        for name, project in self.static.items():
            projected = project(merge_heads(inputs[name]).astype(self.dtype))
            inputs[name] = unit_heads(projected, heads)
        return Streams(momentum_decay=self._momentum_decay(inputs["x"]), **inputs), tuple(new_tails)

    def _momentum_decay(self, x: Float[Array, "B H T K"]) -> Float[Array, "B H T"] | None:
        if self.config.momentum == "none":
            return None
        bias = self.momentum_bias[None, :, None]
        if self.config.momentum == "const":
            return jax.nn.sigmoid(jnp.broadcast_to(bias, x.shape[:-1]))
        return jax.nn.sigmoid(jnp.einsum("bhtk,hk->bht", x, self.momentum_kernel) + bias)
