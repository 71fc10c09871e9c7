"""A small Vision Transformer (pre-norm, learned positions, mean over patches) of stock parts, to try optimizers on."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.tree_util import tree_map_with_path

from hope_jax import train as training
from hope_jax.optim import MuonDimensionNumbers
from hope_jax.types import Array, Float


def patches(images: Float[Array, "B height width C"], size: int) -> Float[Array, "B N P"]:
    """Squares of ``size`` x ``size`` pixels as vectors, row by row; ``size`` must divide height and width."""
    batch, height, width, channels = images.shape
    cut = images.reshape(batch, height // size, size, width // size, size, channels)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)


class EncoderBlock(nn.Module):
    """Attention over the patches, then an MLP; both residual, with a norm before."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        x = x + nn.MultiHeadDotProductAttention(self.heads, use_bias=False)(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width)(hidden)


class ViT(nn.Module):
    """Images [B,height,width,C] to logits [B,classes]; ``from_patches`` has the patches already, [B,N,P]."""

    classes: int
    patch: int
    width: int
    layers: int
    heads: int

    def __call__(self, images: Float[Array, "B height width C"]) -> Float[Array, "B classes"]:
        return self.from_patches(patches(images, self.patch))

    @nn.compact
    def from_patches(self, x: Float[Array, "B N P"]) -> Float[Array, "B classes"]:
        """The logits; the order of the patches is known from ``position_embedding`` alone."""
        x = nn.Dense(self.width, name="embed")(x)
        x = x + self.param("position_embedding", nn.initializers.normal(0.02), (x.shape[1], self.width))[None]
        for i in range(self.layers):
            x = EncoderBlock(self.width, self.heads, name=f"block_{i}")(x)
        x = jnp.mean(nn.LayerNorm(name="norm")(x), axis=1)
        return nn.Dense(self.classes, kernel_init=nn.initializers.zeros, name="head")(x)


def matrices(params: Any) -> Any:
    """Which parameters of a ``ViT`` are matrices and along which axes, the same for every optimizer that asks."""

    def label(path: tuple[Any, ...], leaf: Array) -> Any:
        names = [entry.key for entry in path]
        if leaf.ndim < 2 or {"embed", "position_embedding", "head"} & set(names):
            return "adamw"
        inputs = tuple(range(leaf.ndim - 1)) if "out" in names else 0  # attention: [D, H, K], but out [H, K, D]
        return MuonDimensionNumbers(inputs, leaf.ndim - 1 if "out" in names else tuple(range(1, leaf.ndim)))

    return tree_map_with_path(label, params)


def image_loss(model: ViT) -> Callable[[Any, Any], Any]:
    """Mean cross-entropy in nats and accuracy of a batch with ``images`` and ``labels``."""

    def loss(params: Any, part: Any) -> tuple[Any, Any]:
        logits: Any = model.apply({"params": params}, part.images)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, part.labels)
        count, right = jnp.float32(len(part.labels)), jnp.sum(logits.argmax(-1) == part.labels).astype(jnp.float32)
        metrics = {"loss": training.Mean(jnp.sum(nats), count), "accuracy": training.Mean(right, count)}
        return jnp.mean(nats), metrics

    return loss
