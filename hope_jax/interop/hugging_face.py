"""Our models written under the names of Hugging Face: what ``llama.py`` reads, the other way round.

A ``transformer_pp`` is a Llama up to scales that its weights can hold (``stream.py``). Written here, it computes the
same logits there.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from hope_jax.errors import UserError, extra
from hope_jax.interop.llama import parts_of_llama
from hope_jax.interop.llama_config import Llama
from hope_jax.interop.tensors import WEIGHTS, Part
from hope_jax.nn.config import ModelConfig
from hope_jax.nn.feed_forward.swiglu import SwiGLUConfig
from hope_jax.nn.layers import EPS
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.rotary import RopeScaling
from hope_jax.storage.digests import write_file

with extra("train"):
    from safetensors.numpy import save


def save_llama(folder: str | Path, config: ModelConfig, params: Any) -> None:
    """Write ``config.json`` and ``model.safetensors`` of a Llama into a folder, made if needed, for ``load_llama``.

    Tensors are float32, or as wide as the parameters. Raises UserError for a model that is no Llama, or a folder that
    has such files already; OSError where it cannot be written.
    """
    folder, llama = Path(folder), as_llama(config)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", WEIGHTS):
        if (folder / name).exists():
            raise UserError(f"{folder / name} is there already; choose another folder.")
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in llama_tensors(llama, config, params).items()}
    write_file(folder / WEIGHTS, save(tensors, {"format": "pt"}))  # what readers of such files ask for
    write_file(folder / "config.json", (json.dumps(_fields(llama), indent=2) + "\n").encode())


def as_llama(config: ModelConfig) -> Llama:
    """The sizes of a model as a Llama. Raises UserError, saying why, where it is none."""
    mixer, part = config.mixer, config.feed_forward
    if not isinstance(mixer, AttentionConfig) or not isinstance(part, SwiGLUConfig):
        kinds = [type(kind).__name__ for kind in (mixer, part)]
        raise UserError(f"The model has {kinds[0]} and {kinds[1]}; a Llama has attention and SwiGLU in every block.")
    plain = AttentionConfig(
        mixer.heads, rope_base=mixer.rope_base, rope_scaling=mixer.rope_scaling, key_heads=mixer.key_heads
    )
    same = mixer == plain and part == SwiGLUConfig(part.hidden) and config.norm == "rms" and not config.embedding_norm
    if not same:
        raise UserError(
            "The model has a part that a Llama lacks: a window, convolutions, persistent vectors, levels, LayerNorms "
            "or a norm of the embedding."
        )
    return Llama(
        width=config.width,
        hidden=part.hidden,
        layers=config.layers,
        heads=mixer.heads,
        kv_heads=mixer.key_heads or mixer.heads,
        vocab_size=config.vocab_size,
        context=config.context,
        eps=EPS,
        rope_base=mixer.rope_base,
        rope_scaling=mixer.rope_scaling,
        tied=config.tied,
    )


def llama_tensors(llama: Llama, config: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """Every tensor of the file by its name."""
    return {
        name: tensor
        for part in parts_of_llama(llama, config)
        for name, tensor in zip(part.names, _stored(part, params), strict=True)
    }


def _stored(part: Part, params: Any) -> list[np.ndarray]:
    """The tensors that ``part`` is read from, by layer; both its arrangements are their own inverse."""
    leaf: ArrayLike = params
    for name in part.path.split("/"):
        leaf = leaf[name]  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]
    array = np.asarray(leaf) / np.asarray(leaf).dtype.type(part.factor)
    layers = array if part.path.startswith("blocks/") else array[None]
    return [part.arrange(layer) for layer in layers]


def _fields(llama: Llama) -> dict[str, Any]:
    """``config.json``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": llama.width,
        "intermediate_size": llama.hidden,
        "num_hidden_layers": llama.layers,
        "num_attention_heads": llama.heads,
        "num_key_value_heads": llama.kv_heads,
        "vocab_size": llama.vocab_size,
        "max_position_embeddings": llama.context,
        "rms_norm_eps": llama.eps,
        "rope_theta": llama.rope_base,
        "rope_scaling": None if llama.rope_scaling is None else _scaling(llama.rope_scaling),
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": llama.tied,
    }


def _scaling(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.context is None:
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "original_max_position_embeddings": scaling.context,
    }
