"""The small parts every mixer is built from: norms, a short convolution with state, SwiGLU.

Whatever sees a sequence is ``(x[B,T,D], state) -> (y[B,T,D], state)``; a layer without memory has the state ``()``.
Parameters are float32 (float64 in a float64 model); ``dtype`` is what the matrix products and activations use;
norms compute in at least float32. Read ``attention.py`` next: the simplest mixer made of these.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Initializer
from jax.typing import DTypeLike

from hope_jax.memory.architectures import unit
from hope_jax.memory.kernels import Impl, cpu
from hope_jax.memory.kernels.cpu import by_rows
from hope_jax.nn.axes import Axes, dense_axes
from hope_jax.types import Array, Count, Float, PRNGKeyArray, Stream

EPS = 1e-6

# For layers that are cheap but for their matrix products: the backward pass keeps the results of the products and
# computes the rest again. Less memory, and on CPU less time too, as fresh memory costs more than the arithmetic.
light = functools.partial(nn.remat, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)


def param_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Storage of parameters in a model that computes in ``dtype``: float64 for float64, float32 for everything else."""
    return jnp.promote_types(dtype, jnp.float32)


_FAN_IN = nn.initializers.lecun_normal()


def rows_product(x: Array, kernel: Array, dimensions: Any, **settings: Any) -> Array:
    """The ``dot_general`` of ``nn.Dense``, all axes of ``x`` but the last as one (``by_rows``)."""
    del dimensions  # always the last of x with the first of kernel
    return by_rows(lambda rows: jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **settings), x)


def dense(
    features: int, dtype: DTypeLike, name: str | None = None, start: Initializer = _FAN_IN, bias: float | None = None
) -> nn.Dense:
    """A linear map, kernel ``[in, features]`` drawn with variance 1 / in unless ``start`` says otherwise.

    ``bias`` is the number a learned bias starts at; None: there is no bias.
    """
    wide = param_dtype(dtype)
    fixed = {"dtype": dtype, "param_dtype": wide, "dot_general": rows_product, "name": name}
    offset = nn.initializers.constant(bias or 0.0)
    return nn.Dense(features, use_bias=bias is not None, kernel_init=start, bias_init=offset, **fixed)


def near_identity(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Float[Array, "D D"]:
    """The identity, slightly blurred: queries start in the space of the keys they have to find."""
    return jnp.eye(*shape, dtype=dtype) + 0.02 * jax.random.normal(key, shape, dtype)


def scaled(x: Float[Array, "*batch D"], scale: Float[Array, " D"]) -> Float[Array, "*batch D"]:
    """``x * scale``, features by channel."""
    return by_rows(lambda rows: rows * scale[None], x)


def normal(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """``x / rms(x)`` over the last axis, in at least float32."""
    wide = x.astype(param_dtype(x.dtype))
    return by_rows(lambda rows: rows * jax.lax.rsqrt(jnp.mean(rows * rows, axis=-1, keepdims=True) + EPS), wide)


class RMSNorm(nn.Module):
    """``x / rms(x) * scale`` over the last axis; the mean square in at least float32, the result in ``dtype``."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), param_dtype(self.dtype))
        return scaled(normal(x), scale).astype(self.dtype)


def taps_at(lag: int) -> Initializer:
    """Taps near 1 for the token ``lag`` steps ago and near 0 for the others, with enough of them to learn from."""

    def draw(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Float[Array, "width D"]:
        width = shape[0]
        now = jax.nn.one_hot(width - 1 - min(lag, width - 1), width, dtype=dtype)
        return 0.3 * jax.random.normal(key, shape, dtype) + now[:, None]

    return draw


class ShortConv(nn.Module):
    """Causal depthwise convolution over time, ``y_t = sum_i kernel_i * x_(t - width + 1 + i)``, kernel ``[width, D]``.

    The state is the tail, the last ``width - 1`` inputs, so any cut of a sequence equals the whole. Written as
    ``width`` shifted products: on a CPU more than 20 times faster than a grouped convolution. ``impl`` is that of the
    memories: "auto" has a fast gradient, anything else derivatives in every mode.
    """

    width: int = 4
    dtype: DTypeLike = jnp.float32
    start: Initializer = taps_at(0)
    impl: Impl = "auto"

    @nn.nowrap
    def init_state(self, batch: int, channels: int) -> Float[Array, "B tail D"]:
        """The tail before the first token: zeros."""
        return jnp.zeros((batch, self.width - 1, channels), self.dtype)

    @nn.compact
    def __call__(
        self, x: Stream, tail: Float[Array, "B tail D"], count: Count = None
    ) -> tuple[Stream, Float[Array, "B tail D"]]:
        time, channels = x.shape[1:]
        kernel = self.param("kernel", self.start, (self.width, channels), param_dtype(self.dtype)).astype(self.dtype)
        seen = jnp.concatenate([tail, x.astype(self.dtype)], axis=1)
        convolve = cpu.shifted_sum if self.impl == "auto" else shifted_sum
        return convolve(seen, kernel), last_of(seen, time, count, axis=1)


def last_of(seen: Array, time: int, count: Count, axis: int) -> Array:
    """What stays of ``seen``, older inputs and then ``time`` new ones: as many as were old, the last that are real."""
    if count is None:
        return jax.lax.slice_in_dim(seen, time, None, axis=axis)
    return jax.lax.dynamic_slice_in_dim(seen, count, seen.shape[axis] - time, axis)


def shifted_sum(x: Float[Array, "B seen D"], kernel: Float[Array, "width D"]) -> Float[Array, "B T D"]:
    """``sum_i kernel_i * x_(t + i)`` at every t that has all terms, T = seen - width + 1."""
    time = x.shape[1] - len(kernel) + 1
    return functools.reduce(jnp.add, [scaled(x[:, i : i + time], tap) for i, tap in enumerate(kernel)])


def short_convs(width: int, dtype: DTypeLike, impl: Impl) -> list[ShortConv]:
    """The convolutions of a memory's queries, keys and values.

    Keys start as the token before the one whose value is stored, queries as the current one: what came after it?
    """
    lags = {"q": 0, "k": 1, "v": 0}
    return [ShortConv(width, dtype, taps_at(lag), impl, name=f"conv_{n}") for n, lag in lags.items()]


def split_heads(x: Stream, heads: int) -> Float[Array, "B H T K"]:
    """[B,T,D] -> [B,H,T,D/H]."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], heads, -1), 1, 2)


def unit_heads(x: Stream, heads: int) -> Float[Array, "B H T K"]:
    """Heads of norm 1: normalised before they are moved, while a head's features lie side by side."""
    return jnp.swapaxes(unit(x.reshape(*x.shape[:2], heads, -1)), 1, 2)


def merge_heads(x: Float[Array, "B H T K"]) -> Stream:
    """[B,H,T,K] -> [B,T,H*K]."""
    return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)


def over_heads(head: Callable[..., Any], shared: tuple[Any, ...], own: tuple[Any, ...], impl: Impl) -> Any:
    """``head(*shared, *own)`` of every head of every sequence.

    Args:
      head: a function of one head's arrays.
      shared: what the sequences of a batch share, leaves [H,...].
      own: what each sequence has, leaves [B,H,...].
      impl: "auto" runs batch and heads as one axis, which is fast on CPU.

    Returns:
      Its results, leaves [B,H,...].
    """
    if impl == "auto":
        return cpu.batch_and_heads_as_one(head, shared, own)
    of_sequence = jax.vmap(head)
    return jax.vmap(of_sequence, in_axes=(None,) * len(shared) + (0,) * len(own))(*shared, *own)


def output_axes() -> Axes:
    """Axis names of the two layers that every output has."""
    return {"gate": dense_axes("embed", "all_heads"), "down": dense_axes("all_heads", "embed")}


class HeadOutput(nn.Module):
    """What a mixer does with the reads of a plain memory: ``W_o(RMSNorm_head(reads) * silu(W_g u))`` (SPEC 2.8)."""

    heads: int
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.gate = dense(self.width, self.dtype)
        self.down = dense(self.width, self.dtype)
        shape = (self.heads, self.width // self.heads)
        self.scale = self.param("scale", nn.initializers.ones, shape, param_dtype(self.dtype))

    @nn.nowrap
    def axes(self) -> Axes:
        """See ``nn/axes.py``."""
        return {**output_axes(), "scale": ("heads", "head_dim")}

    @light
    def __call__(self, u: Stream, reads: Float[Array, "B H T V"]) -> Stream:
        merged = scaled(merge_heads(normal(reads)), self.scale.reshape(-1))
        return self.down(merged.astype(self.dtype) * nn.silu(self.gate(u)))


class AnswerOutput(nn.Module):
    """What a mixer does with the reads of a residual memory: ``W_o [s q * silu(W_g u); s' (M(q) - q)]``.

    Such a memory returns the query itself and what it found, which is small beside it. Kept apart, the two have maps
    of their own, and what was found is neither gated nor normalised: its size says how much the memory knows. The
    scales are per channel.
    """

    heads: int
    width: int
    dtype: DTypeLike

    def setup(self) -> None:
        self.gate = dense(self.width, self.dtype)
        self.down = dense(self.width, self.dtype)
        self.scale_query, self.scale_answer = self._scale("query", 1.0), self._scale("answer", 4.0)

    def _scale(self, name: str, start: float) -> Array:
        """Multiples of sqrt(K): a query of norm 1 has features of size 1."""
        size = self.width // self.heads
        constant = nn.initializers.constant(start * size**0.5)
        return self.param(f"scale_{name}", constant, (self.heads, size), param_dtype(self.dtype))

    @nn.nowrap
    def axes(self) -> Axes:
        """See ``nn/axes.py``."""
        return {**output_axes(), "scale_query": ("heads", "head_dim"), "scale_answer": ("heads", "head_dim")}

    @light
    def __call__(self, u: Stream, queries: Float[Array, "B H T K"], answers: Float[Array, "B H T V"]) -> Stream:
        asked = scaled(merge_heads(queries), self.scale_query.reshape(-1)).astype(self.dtype)
        found = scaled(merge_heads(answers), self.scale_answer.reshape(-1)).astype(self.dtype)
        return self.down(jnp.concatenate([asked * nn.silu(self.gate(u)), found], axis=-1))
