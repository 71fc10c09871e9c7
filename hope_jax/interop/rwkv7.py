"""An RWKV-7 checkpoint as the model of the row ``rwkv7``: of Hugging Face (``RWKV7ForCausalLM``) or of the authors.

The authors' own files have no ``config.json`` and other names (``rwkv7_sizes.py``). Both epsilons are absorbed exactly.

The model's norms, of epsilon E here and e there, as in ``stream.py``: all that is added to the residual stream, and the
scale and bias of the embedding's norm, are multiplied by c. Then c x has the norm of x::

    (c x - mean(c x)) / sqrt(var(c x) + E) = (x - mean(x)) / sqrt(var(x) + e)        c^2 = E / e

The norm of a head's read, of epsilon EPS here and e there: values are multiplied by s, so reads r are s r. The bonus,
which is added after the norm and is linear in the values, is divided by s::

    (s r - mean(s r)) / sqrt(var(s r) + EPS) = (r - mean(r)) / sqrt(var(r) + e)      s^2 = EPS / e
"""

import contextlib
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from hope_jax.interop.fields import check_plain, positive, read_json, whole
from hope_jax.interop.rwkv7_sizes import LETTERS, Sizes, aliases_of, low_rank, sizes_of
from hope_jax.interop.stream import stream_factor
from hope_jax.interop.tensors import HEAD, Checkpoint, Part, Tensors, by_layer
from hope_jax.nn.config import ModelConfig
from hope_jax.nn.language_model import LOGIT_GAIN
from hope_jax.nn.layers import LAYER_EPS
from hope_jax.nn.mixers.channel_mix import ChannelMixConfig
from hope_jax.nn.mixers.rwkv7 import EPS, RWKV7Config

PLAIN = {
    "architectures": (["RWKV7ForCausalLM"], None),
    "hidden_act": ("sqrelu", None),
    "norm_first": (True, None),
    "norm_bias": (True, None),
    "attn": (None,),
    "tie_word_embeddings": (False, None),
}
# fmt: off
READ = {  # fields that decide the model: sizes, which must be those of the tensors, and the norms' epsilon
    "hidden_size", "attention_hidden_size", "intermediate_size", "num_hidden_layers", "num_heads",
    "num_attention_heads", "head_dim", "vocab_size", "value_dim", "decay_low_rank_dim", "a_low_rank_dim",
    "v_low_rank_dim", "gate_low_rank_dim", "norm_eps", "max_position_embeddings",
}
UNUSED = {  # of the arithmetic, of training, of loading in PyTorch, and one that follows from others
    "attn_mode", "fuse_norm", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp", "auto_map",
    "hidden_ratio",
}
# fmt: on
MIXED = {"receptance": "r", "decay": "w", "key": "k", "value": "v", "rate": "a", "gate": "g"}
TIME, CHANNEL = "blocks/parts_0", "blocks/parts_1"
ByLayer = Callable[[str], list[str]]


def is_of_the_authors(folder: Path) -> bool:
    """Whether a folder holds a file of the authors, which needs no ``config.json``."""
    return not (folder / "config.json").exists() and bool(aliases_of(folder))


def describe_rwkv7(path: Path, dtype: DTypeLike) -> Checkpoint:
    """The model and its parts. UserError for hybrids, for norms without bias or behind their parts, for a tied head,
    and for sizes, those of low-rank maps too, that contradict each other or ``config.json``."""
    aliases = aliases_of(path.parent)
    fields = {} if aliases and not path.exists() else _fields(path)
    with contextlib.ExitStack() as stack:
        tensors = Tensors(path.parent, stack, aliases)
        sizes = sizes_of(tensors, transposed=not aliases)
        sizes.check(fields)
        eps, head_eps = _epsilons(fields, sizes)
        layer, factor = functools.partial(by_layer, sizes.layers, "model.layers"), stream_factor(eps, LAYER_EPS)
        parts = [
            *_ends(sizes, factor),
            *_time(sizes, layer, factor, math.sqrt(EPS / head_eps)),
            *_low_rank(sizes, transposed=not aliases),
            *_channel(sizes, layer, factor),
        ]
        parts = [_as_stored(part, tensors) for part in parts]
    return Checkpoint(_model(sizes, fields, dtype), parts, _has_no_effect, aliases)


def _fields(path: Path) -> dict[str, Any]:
    fields = read_json(path, "RWKV-7 checkpoint")
    check_plain(path, fields, "rwkv7", PLAIN, READ | UNUSED)
    return fields


def _epsilons(fields: dict[str, Any], sizes: Sizes) -> tuple[float, float]:
    """Of the model's norms, and of that of a head's read; the authors' files say neither."""
    if not fields:
        return LAYER_EPS, EPS
    eps = positive("norm_eps", fields.get("norm_eps", 1e-5))
    return eps, eps * sizes.width / sizes.heads


def _model(sizes: Sizes, fields: dict[str, Any], dtype: DTypeLike) -> ModelConfig:
    ranks: dict[str, Any] = {f"{name}_rank": rank for name, rank in sizes.ranks.items()}
    return ModelConfig(
        mixer=(RWKV7Config(sizes.width // sizes.heads, **ranks), ChannelMixConfig(sizes.hidden)),
        feed_forward=(None, None),
        width=sizes.width,
        layers=2 * sizes.layers,
        vocab_size=sizes.vocab_size,
        context=whole(fields, "max_position_embeddings", 2048),
        dtype=dtype,
        tied=False,
        norm="layer",
        embedding_norm=True,
    )


def _ends(sizes: Sizes, stream: float) -> list[Part]:
    """Embedding and its norm, last norm and head."""
    table, width = (sizes.vocab_size, sizes.width), sizes.width
    return [
        Part("embedding", ["model.embeddings.weight"], table, np.asarray, stream / math.sqrt(width)),
        *_norm("embedding_norm", ["model.layers.0.pre_norm"], width, stream),
        *_norm("norm", ["model.norm"], width, 1 / LOGIT_GAIN),
        Part("head", [HEAD], table),
    ]


def _norm(path: str, names: list[str], width: int, factor: float = 1.0) -> list[Part]:
    tensors = {"scale": "weight", "bias": "bias"}
    return [
        Part(f"{path}/{n}", [f"{x}.{stored}" for x in names], (width,), factor=factor) for n, stored in tensors.items()
    ]


def _time(sizes: Sizes, layer: ByLayer, stream: float, values: float) -> list[Part]:
    """The parts of the time mix, without its low-rank maps."""
    width, mixer = sizes.width, f"{TIME}/mixer"
    maps = {"receptance": ("r", 1.0), "key": ("k", 1.0), "value": ("v", values), "out": ("o", stream)}
    vectors = {"erase_scale": "k_k", "key_scale": "k_a", **{f"mix_{n}": f"x_{x}" for n, x in MIXED.items()}}
    heads = (sizes.heads, width // sizes.heads)
    return [
        *_norm(f"{TIME}/norm", layer("attn_norm"), width),
        *(
            Part(f"{mixer}/{n}/kernel", layer(f"attn.{x}_proj.weight"), (width, width), factor=f)
            for n, (x, f) in maps.items()
        ),
        *(Part(f"{mixer}/{n}", layer(f"attn.{stored}"), (width,)) for n, stored in vectors.items()),
        Part(f"{mixer}/bonus", layer("attn.r_k"), heads, np.asarray, 1 / values),
        *_norm(f"{mixer}/norm", layer("attn.g_norm"), width),
    ]


def _low_rank(sizes: Sizes, transposed: bool) -> list[Part]:
    parts, arrange = [], np.transpose if transposed else np.asarray
    for kind in LETTERS:
        inwards = (sizes.ranks[kind], sizes.width) if transposed else (sizes.width, sizes.ranks[kind])
        names = functools.partial(low_rank, sizes.layers, kind)
        parts.append(Part(f"{TIME}/mixer/{kind}/down/kernel", names("0.weight"), inwards, arrange))
        parts.append(Part(f"{TIME}/mixer/{kind}/up/kernel", names("2.weight"), inwards[::-1], arrange))
        if kind != "gate":
            parts.append(Part(f"{TIME}/mixer/{kind}/offset", names("2.bias"), (sizes.width,)))
    return parts


def _channel(sizes: Sizes, layer: ByLayer, stream: float) -> list[Part]:
    up = (sizes.hidden, sizes.width)
    return [
        *_norm(f"{CHANNEL}/norm", layer("ffn_norm"), sizes.width),
        Part(f"{CHANNEL}/mixer/mix", layer("ffn.x_k"), (sizes.width,)),
        Part(f"{CHANNEL}/mixer/key/kernel", layer("ffn.key.weight"), up),
        Part(f"{CHANNEL}/mixer/value/kernel", layer("ffn.value.weight"), up[::-1], factor=stream),
    ]


def _as_stored(part: Part, tensors: Tensors) -> Part:
    """Vectors may be stored as [1, 1, D]."""
    long = (1, 1, *part.shape)
    if len(part.shape) == 1 and tensors.shape(part.names[0]) == long:
        return part._replace(shape=long, arrange=np.ravel)
    return part


def _has_no_effect(name: str, tensors: Tensors) -> bool:
    """The share of the first layer's value in the first layer itself, which the authors' files have."""
    del tensors
    return name.startswith(f"model.layers.0.attn.{LETTERS['share']}_lora.")
