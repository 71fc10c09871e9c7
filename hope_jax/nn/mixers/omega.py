"""The memory mixer with the Omega rule (ATLAS, arXiv 2505.23735): every token writes its last pairs again."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.memory import omega
from hope_jax.memory.rule import Gates
from hope_jax.nn import layers
from hope_jax.nn.mixers.memory import MemoryMixer, MemoryMixerConfig
from hope_jax.types import Array, Stream


@dataclass(frozen=True)
class OmegaMixerConfig(MemoryMixerConfig):
    """``MemoryMixerConfig`` with a window.

    Attributes:
      window: pairs that each token writes; each has a strength gate of its own, rate_max * sigmoid(w x + rate_bias).

    Raises:
      UserError: a rule that ``memory.omega.Omega`` refuses, or anything that ``MemoryMixerConfig`` refuses.
    """

    window: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.spec()

    def spec(self) -> omega.Omega:
        """The rule with its window."""
        return omega.Omega(self.rule, self.window)

    def build(self, width: int, dtype: DTypeLike) -> "OmegaMixer":
        layers.check_heads(self.heads, width)
        return OmegaMixer(self, width, dtype)


class OmegaMixer(MemoryMixer):
    """``(u[B,T,D], state) -> (y[B,T,D], state)``; the state also holds the last ``window - 1`` keys and values."""

    config: OmegaMixerConfig

    @nn.nowrap
    def _gates(self) -> dict[str, float]:
        gates = super()._gates()
        return gates | {f"rate_{lag}": gates["rate"] for lag in range(1, self.config.window) if "rate" in gates}

    def _start(self) -> omega.OmegaState:
        of_head = functools.partial(self.config.spec().start, values=self.width // self.config.heads)
        return jax.vmap(of_head)(self.initial)

    @nn.nowrap
    def _read_head(self, count, position, initial, fast, tokens) -> tuple[Any, tuple[Array, None]]:
        (k, v, q, gates), (c, spec) = tokens, (self.config, self.config.spec())
        strength, retention = gates.rate, gates.retention
        fast, reads = omega.scan(spec, initial, fast, k, v, q, strength, retention, position, c.impl, count)
        return fast, (reads, None)

    def _gates_of(self, u: Stream) -> Gates:
        """As ``MemoryMixer``, but ``rate`` [B,H,T,c] has the strengths of the window's pairs."""
        gates, rate = super()._gates_of(u), self.config.rate_max
        rates = [gates.rate] * self.config.window
        for lag in range(1, self.config.window if "rate" in self.gates else 1):
            rates[lag] = rate * jnp.swapaxes(jax.nn.sigmoid(self.gates[f"rate_{lag}"](u)), 1, 2)
        return gates._replace(rate=jnp.stack(rates, axis=-1))
