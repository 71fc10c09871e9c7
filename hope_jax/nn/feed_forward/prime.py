"""Two gated feed-forward parts, one after the other, the first of which can be written while a sequence is read.

That is the block of TTT-E2E (arXiv 2512.23675): the first part, the paper's "prime" MLP, stores what the sequence says,
from the loss of the whole model (``context/writes.py``), and the second keeps what training taught.
"""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import whole
from hope_jax.nn.axes import Axes
from hope_jax.nn.feed_forward.swiglu import SwiGLUConfig, learned_rate, rate_axes
from hope_jax.types import Stream


@dataclass(frozen=True)
class PrimeConfig(SwiGLUConfig):
    """Two gated parts: the settings of ``SwiGLUConfig`` are those of the first, ``static`` is that of the second.

    Attributes:
      static: inner features of the second part, at least 1; it is never written.
    """

    static: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("static", self.static, 1, "inner features")

    @property
    def parts(self) -> dict[str, SwiGLUConfig]:
        """Both parts without levels of their own."""
        return {"prime": SwiGLUConfig(self.hidden), "second": SwiGLUConfig(self.static)}

    def build(self, width: int, dtype: DTypeLike) -> "Prime":
        return Prime(self, width, dtype)

    def kernels(self, params: Any) -> tuple[dict[str, Any], ...]:
        return (params["prime"],)


class Prime(nn.Module):
    """``(x[B,T,D], deltas) -> x``; norms and residual connections are inside."""

    config: PrimeConfig
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        parts = self.config.parts
        self.prime = parts["prime"].build(self.width, self.dtype)
        self.second = parts["second"].build(self.width, self.dtype)
        self.rate = learned_rate(self)

    @nn.nowrap
    def axes(self) -> Axes:
        parts = {name: part.build(self.width, self.dtype).axes() for name, part in self.config.parts.items()}
        return parts | rate_axes(self.config)

    def __call__(self, x: Stream, deltas: tuple[Any, ...]) -> Stream:
        return self.second(self.prime(x, deltas), ())
