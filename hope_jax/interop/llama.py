"""A Llama checkpoint (safetensors, Hugging Face names) as a ``transformer_pp``.

Rotary positions pair feature i with i + K/2 in both, with the scaling (linear or of Llama 3) that a checkpoint has.
"""

import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from hope_jax.interop.llama_config import Llama, read_llama
from hope_jax.interop.stream import ends, stream_factor, swiglu
from hope_jax.interop.tensors import Checkpoint, Part, Tensors, by_layer, read_model
from hope_jax.nn.config import ModelConfig
from hope_jax.nn.feed_forward.swiglu import SwiGLUConfig
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.rotary import rope_speeds

SPEEDS = "rotary_emb.inv_freq"  # older files hold the rotary speeds, which follow from config.json


def load_llama(folder: str | Path, dtype: DTypeLike = jnp.float32) -> tuple[ModelConfig, dict[str, Any]]:
    """``interop.load`` of a folder that must hold a Llama, with the same arguments and errors."""
    return read_model(folder, describe_llama, dtype)


def describe_llama(path: Path, dtype: DTypeLike) -> Checkpoint:
    """The model and its parts. UserError: the configuration is not Llama's or contradicts itself, or the model has
    other rotary positions, biases, heads of another size, another activation or a field that is not known."""
    llama = read_llama(path)
    config = ModelConfig(
        mixer=AttentionConfig(
            llama.heads, rope_base=llama.rope_base, rope_scaling=llama.rope_scaling, key_heads=llama.kv_heads
        ),
        feed_forward=SwiGLUConfig(llama.hidden),
        width=llama.width,
        layers=llama.layers,
        vocab_size=llama.vocab_size,
        context=llama.context,
        dtype=dtype,
        tied=llama.tied,
    )
    return Checkpoint(config, parts_of_llama(llama, config), functools.partial(_speeds_follow, llama))


def parts_of_llama(llama: Llama, config: ModelConfig) -> list[Part]:
    """Every parameter and where it comes from."""
    width, layer = llama.width, functools.partial(by_layer, llama.layers, "model.layers")
    shared = (llama.kv_heads * llama.head_size, width)
    factor = stream_factor(llama.eps)
    return [
        *ends(config, llama.eps, "model.embed_tokens.weight", "model.norm.weight"),
        Part("blocks/norm/scale", layer("input_layernorm.weight"), (width,)),
        Part("blocks/mixer/query/kernel", layer("self_attn.q_proj.weight"), (width, width)),
        Part("blocks/mixer/key/kernel", layer("self_attn.k_proj.weight"), shared),
        Part("blocks/mixer/value/kernel", layer("self_attn.v_proj.weight"), shared),
        Part("blocks/mixer/out/kernel", layer("self_attn.o_proj.weight"), (width, width), factor=factor),
        *swiglu(layer, "post_attention_layernorm.weight", width, llama.hidden, llama.eps),
    ]


def _speeds_follow(llama: Llama, name: str, tensors: Tensors) -> bool:
    """Whether stored rotary speeds are those of the base, scaled or not, up to the rounding of 16 bits."""
    if not name.endswith(SPEEDS):
        return False
    stored = tensors.read(name).astype(float)
    of_base, scaled = (
        np.asarray(rope_speeds(llama.head_size, llama.rope_base, scaling, jnp.float32))
        for scaling in (None, llama.rope_scaling)
    )
    return stored.shape == of_base.shape and any(
        np.allclose(stored, speeds, rtol=2**-8, atol=1e-6) for speeds in (of_base, scaled)
    )
