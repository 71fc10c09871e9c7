"""The small parts of every mixer: linear maps, norms, a short convolution with state, heads, and their output.

Parameters are float32 (float64 in a float64 model); ``dtype`` is what the matrix products and activations use;
norms compute in at least float32. Read ``attention.py`` next: the simplest mixer made of these.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Initializer
from jax.typing import DTypeLike

from hope_jax.errors import UserError
from hope_jax.memory.architectures import unit
from hope_jax.memory.kernels import Impl, products_of
from hope_jax.memory.products import by_rows
from hope_jax.nn.axes import Axes, dense_axes
from hope_jax.nn.tokens import by_feature, by_token
from hope_jax.types import Array, Count, Float, PRNGKeyArray, Stream

EPS = 1e-6
LAYER_EPS = 1e-5  # of LayerNorm

# For layers that are cheap except for their matrix products: the backward pass keeps the results of the products and
# computes the rest again. Less memory, and on CPU less time too, as fresh memory costs more than the arithmetic.
light = functools.partial(nn.remat, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)


def param_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Storage of parameters in a model that computes in ``dtype``: float64 for float64, float32 for everything else."""
    return jnp.promote_types(dtype, jnp.float32)


FAN_IN = nn.initializers.lecun_normal()  # variance 1 / in
# U(-n^-1/2, n^-1/2) for n inputs: PyTorch's start of linear maps, and of convolutions, whose inputs are their taps.
TORCH = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def rows_product(x: Array, kernel: Array, dimensions: Any, **settings: Any) -> Array:
    """The ``dot_general`` of ``nn.Dense``, with all axes of ``x`` but the last joined to one (``by_rows``).

    Where devices share tokens, x and y are divided over them in the same way. Otherwise, where the gradient of y is
    divided by heads along the axis of the mesh that divides x by tokens, XLA (jax 0.10.2) computes a wrong gradient
    of the kernel.
    """
    del dimensions  # always the last of x with the first of kernel
    y = by_rows(lambda rows: jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **settings), x)
    return by_token(y) if y.ndim == 3 else y


def dense(
    features: int, dtype: DTypeLike, name: str | None = None, start: Initializer = FAN_IN, bias: float | None = None
) -> nn.Dense:
    """A linear map [in, features], with a learned bias if ``bias`` is the number at which it starts."""
    offset = nn.initializers.constant(bias or 0.0)
    fixed: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype(dtype), dot_general=rows_product, name=name)
    return nn.Dense(features, use_bias=bias is not None, kernel_init=start, bias_init=offset, **fixed)


def near_identity(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Float[Array, "D D"]:
    """The identity plus small random numbers: queries start in the space of the keys they have to find."""
    return jnp.eye(*shape, dtype=dtype) + 0.02 * jax.random.normal(key, shape, dtype)


def scaled(x: Float[Array, "*batch D"], scale: Float[Array, " D"]) -> Float[Array, "*batch D"]:
    """``x * scale``, one factor for each feature."""
    return by_rows(lambda rows: rows * scale[None], x)


def normal(x: Float[Array, "*batch D"], eps: float = EPS) -> Float[Array, "*batch D"]:
    """``x / rms(x)`` over the last axis, in at least float32; ``eps`` is added to the mean square."""
    wide = x.astype(param_dtype(x.dtype))
    return by_rows(lambda rows: rows * jax.lax.rsqrt(jnp.mean(rows * rows, axis=-1, keepdims=True) + eps), wide)


class RMSNorm(nn.Module):
    """``x / rms(x) * scale`` over the last axis; the mean square in at least float32, the result in ``dtype``.

    ``start``: the initial value of all scales.
    """

    dtype: DTypeLike = jnp.float32
    start: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        start = nn.initializers.constant(self.start)
        scale = self.param("scale", start, (x.shape[-1],), param_dtype(self.dtype))
        return scaled(normal(x), scale).astype(self.dtype)


class LayerNorm(nn.Module):
    """``(x - mean) / sqrt(variance + 1e-5) * scale + bias`` over the last axis; settings as in ``RMSNorm``."""

    dtype: DTypeLike = jnp.float32
    start: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        size, wide = (x.shape[-1],), param_dtype(self.dtype)
        scale = self.param("scale", nn.initializers.constant(self.start), size, wide)
        bias = self.param("bias", nn.initializers.zeros, size, wide)
        centred = by_rows(lambda rows: rows - jnp.mean(rows, axis=-1, keepdims=True), x.astype(wide))
        return by_rows(lambda rows: rows + bias[None], scaled(normal(centred, LAYER_EPS), scale)).astype(self.dtype)


def taps_at(lag: int, size: float = 1.0) -> Initializer:
    """Taps near ``size`` for the token ``lag`` steps ago and near 0, but not 0, for the others.

    So these can learn, too.
    """

    def draw(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Float[Array, "width D"]:
        width = shape[0]
        now = jax.nn.one_hot(width - 1 - min(lag, width - 1), width, dtype=dtype)
        return 0.3 * jax.random.normal(key, shape, dtype) + size * now[:, None]

    return draw


class ShortConv(nn.Module):
    """Causal depthwise convolution over time, ``y_t = sum_i kernel_i * x_(t - width + 1 + i)``, kernel ``[width, D]``.

    The state is the tail, the last ``width - 1`` inputs. Written as ``width`` shifted products: on a CPU more than 20
    times faster than a grouped convolution. ``impl`` is that of the memories. ``bias`` is the start of
    a learned vector [D] that is added; None: there is none.
    """

    width: int = 4
    dtype: DTypeLike = jnp.float32
    start: Initializer = taps_at(0)
    impl: Impl = "auto"
    bias: Initializer | None = None

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
        seen = jnp.concatenate([tail, by_feature(x.astype(self.dtype))], axis=1)
        y, tail = products_of(self.impl).shifted_sum(seen, kernel), last_of(seen, time, count, axis=1)
        if self.bias is not None:
            bias = self.param("bias", self.bias, (channels,), param_dtype(self.dtype))
            y = by_rows(lambda rows: rows + bias.astype(y.dtype)[None], y)
        return y, tail


def last_of(seen: Array, time: int, count: Count, axis: int) -> Array:
    """The part of ``seen`` to keep: as many inputs as were old, and the last real ones.

    ``seen`` are the old inputs and then ``time`` new ones along ``axis``, of which the first ``count`` are real.
    """
    if count is None:
        return jax.lax.slice_in_dim(seen, time, None, axis=axis)
    return jax.lax.dynamic_slice_in_dim(seen, count, seen.shape[axis] - time, axis)


def short_convs(
    width: int, dtype: DTypeLike, impl: Impl, starts: Sequence[Initializer] = (TORCH, TORCH, TORCH)
) -> list[ShortConv]:
    """The convolutions of a memory's queries, keys and values, whose taps start as ``starts`` say, in that order."""
    pairs = zip("qkv", starts, strict=True)
    return [ShortConv(width, dtype, start, impl, name=f"conv_{n}") for n, start in pairs]


def persistent_vectors(module: Any, count: int) -> Float[Array, "P D"] | None:
    """Parameter ``persistent`` of a mixer, vectors in front of every sequence; None if ``count`` is 0.

    The mixer reads them beside the normed tokens. They are not normed themselves: they are learned as inputs of the
    mixer, their size included. Titans (arXiv 2501.00663) gives no start; here it is that of a token embedding.
    """
    shape, start = (count, module.width), nn.initializers.normal(0.02)
    return module.param("persistent", start, shape, param_dtype(module.dtype)) if count else None


def check_heads(heads: int, width: int, even: bool = False) -> None:
    """Raise UserError unless ``heads`` divide the width; ``even``: each must have an even number of features."""
    multiple = (1 + even) * heads
    if width % multiple:
        of = " into heads of an even number of features" if even else ""
        choose = f"choose a divisor, or a width that is a multiple of {multiple}"
        raise UserError(f"{heads} heads do not divide width {width}{of}; {choose}")


def split_heads(x: Stream, heads: int) -> Float[Array, "B H T K"]:
    """[B,T,D] -> [B,H,T,D/H]."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], heads, -1), 1, 2)


def unit_heads(x: Stream, heads: int) -> Float[Array, "B H T K"]:
    """Heads of norm 1: normalised before they are moved, while a head's features lie side by side."""
    return jnp.swapaxes(unit(x.reshape(*x.shape[:2], heads, -1)), 1, 2)


def merge_heads(x: Float[Array, "B H T K"]) -> Stream:
    """[B,H,T,K] -> [B,T,H*K]."""
    return by_token(jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1))


def for_batch(state: Any, batch: int) -> Any:
    """The state of one sequence, leaves [...], for each of ``batch`` sequences, leaves [B,...]."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), state)


class HeadOutput(nn.Module):
    """The output of a mixer from the reads of its memories: ``W_o(s RMSNorm_head(reads) * silu(W_g u))`` (SPEC 2.8).

    With ``asks``, ``W_o [s q * silu(W_g u); s' answers]`` of queries and answers: a residual memory returns the query
    itself plus an answer that is small beside it. Here each of the two has a map of its own, and the answer is neither
    gated nor normalised: its size says how much the memory knows. There is a scale for each feature.
    """

    heads: int
    width: int
    asks: bool
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.gate = dense(self.width, self.dtype)
        self.down = dense(self.width, self.dtype)
        size = self.width // self.heads
        starts = (size**0.5, 4 * size**0.5) if self.asks else (1.0,)  # a query of norm 1 has features of size K^-1/2
        draws = zip(self._names(), map(nn.initializers.constant, starts), strict=True)
        self.scales = [self.param(name, start, (self.heads, size), param_dtype(self.dtype)) for name, start in draws]

    @nn.nowrap
    def _names(self) -> tuple[str, ...]:
        return ("scale_query", "scale_answer") if self.asks else ("scale",)

    @nn.nowrap
    def axes(self) -> Axes:
        maps = {"gate": dense_axes("embed", "all_heads"), "down": dense_axes("all_heads", "embed")}
        return maps | dict.fromkeys(self._names(), ("heads", "head_dim"))

    @light
    def __call__(self, u: Stream, *reads: Float[Array, "B H T V"]) -> Stream:
        pairs = zip(reads if self.asks else map(normal, reads), self.scales, strict=True)
        gated, *answers = [scaled(merge_heads(x), scale.reshape(-1)).astype(self.dtype) for x, scale in pairs]
        return self.down(jnp.concatenate([gated * nn.silu(self.gate(u)), *answers], axis=-1))
