"""A Gated DeltaNet checkpoint of flash-linear-attention (``GatedDeltaNetForCausalLM``) as the row ``gated_deltanet``.

The norm inside of the layer has no stream to absorb its epsilon, so the mixer has it.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from hope_jax.errors import UserError
from hope_jax.interop.fields import check_plain, positive, read_json, whole, yes_or_no
from hope_jax.interop.stream import ends, stream_factor, swiglu
from hope_jax.interop.tensors import Checkpoint, Part, by_layer, taps
from hope_jax.nn.config import ModelConfig
from hope_jax.nn.feed_forward.swiglu import SwiGLUConfig
from hope_jax.nn.mixers.gated_deltanet import GatedDeltaNetConfig

PLAIN = {
    "architectures": (["GatedDeltaNetForCausalLM"], None),
    "hidden_act": ("swish", "silu"),
    "use_gate": (True,),
    "use_short_conv": (True,),
    "allow_neg_eigval": (False,),
    "attn": (None,),
}
# fmt: off
READ = {  # fields that decide the model and are read below
    "hidden_size", "num_hidden_layers", "num_heads", "num_v_heads", "head_dim", "expand_v", "conv_size", "norm_eps",
    "hidden_ratio", "intermediate_size", "vocab_size", "max_position_embeddings", "tie_word_embeddings",
}
UNUSED = {  # of the arithmetic and of training
    "attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp",
}
# fmt: on


def describe_gated_deltanet(path: Path, dtype: DTypeLike) -> Checkpoint:
    """The model and its parts. UserError for hybrids, and for layers without gate or convolution or with rates to 2."""
    fields = read_json(path, "Gated DeltaNet checkpoint")
    check_plain(path, fields, "gated_deltanet", PLAIN, READ | UNUSED)
    eps = positive("norm_eps", fields.get("norm_eps", 1e-6))
    mixer, hidden = _mixer(fields, eps), _hidden(fields)
    config = ModelConfig(
        mixer=mixer,
        feed_forward=SwiGLUConfig(hidden),
        width=whole(fields, "hidden_size"),
        layers=whole(fields, "num_hidden_layers"),
        vocab_size=whole(fields, "vocab_size"),
        context=whole(fields, "max_position_embeddings", 2048),
        dtype=dtype,
        tied=yes_or_no(fields, "tie_word_embeddings", False),
    )
    layer = functools.partial(by_layer, config.layers, "model.layers")
    parts = [
        *ends(config, eps, "model.embeddings.weight", "model.norm.weight"),
        Part("blocks/norm/scale", layer("attn_norm.weight"), (config.width,)),
        *_mixer_parts(layer, mixer, config.width),
        *swiglu(layer, "mlp_norm.weight", config.width, hidden, eps),
    ]
    return Checkpoint(config, parts)


def _mixer(fields: dict[str, Any], eps: float) -> GatedDeltaNetConfig:
    heads, size = whole(fields, "num_heads"), whole(fields, "head_dim")
    value_heads, expand = whole(fields, "num_v_heads", heads), positive("expand_v", fields.get("expand_v", 2.0))
    if value_heads % heads:
        raise UserError(f"config.json has num_v_heads={value_heads}, which num_heads={heads} does not divide.")
    value_size = round(size * expand)
    if not math.isclose(value_size, size * expand, rel_tol=1e-5):
        raise UserError(f"config.json has head_dim={size} and expand_v={expand}; expected a whole number as product.")
    conv = whole(fields, "conv_size", 4)
    return GatedDeltaNetConfig(heads, size, value_size, value_heads // heads, conv, norm_eps=eps)


def _hidden(fields: dict[str, Any]) -> int:
    """Hidden features of the feed-forward part: where there is no number, about ratio * 2/3 of the width, as theirs."""
    if fields.get("intermediate_size") is not None:
        return whole(fields, "intermediate_size")
    ratio = fields.get("hidden_ratio")
    least = int(whole(fields, "hidden_size") * positive("hidden_ratio", 4 if ratio is None else ratio) * 2 / 3)
    return -(-least // 256) * 256


def _mixer_parts(layer: Callable[[str], list[str]], mixer: GatedDeltaNetConfig, width: int) -> list[Part]:
    """Every parameter of the mixers; ``layer(name)``: the names of a tensor by layer."""
    heads, place = mixer.value_heads, "blocks/mixer"
    keys, values = mixer.heads * mixer.key_size, heads * mixer.value_size
    parts = []
    for name, size in {"query": keys, "key": keys, "value": values}.items():
        stored = f"attn.{name[0]}"
        parts += [
            Part(f"{place}/{name}/project/kernel", layer(f"{stored}_proj.weight"), (size, width)),
            Part(f"{place}/{name}/conv/kernel", layer(f"{stored}_conv1d.weight"), (size, 1, mixer.conv), taps),
        ]
    return [
        *parts,
        Part(f"{place}/decay/map/kernel", layer("attn.a_proj.weight"), (heads, width)),
        Part(f"{place}/decay/step_bias", layer("attn.dt_bias"), (heads,)),
        Part(f"{place}/decay/log_decay", layer("attn.A_log"), (heads,)),
        Part(f"{place}/rate/kernel", layer("attn.b_proj.weight"), (heads, width)),
        Part(f"{place}/out/gate/kernel", layer("attn.g_proj.weight"), (values, width)),
        Part(f"{place}/out/scale", layer("attn.o_norm.weight"), (mixer.value_size,)),
        Part(
            f"{place}/out/down/kernel",
            layer("attn.o_proj.weight"),
            (width, values),
            factor=stream_factor(mixer.eps),
        ),
    ]
