"""``load``: any checkpoint whose architecture is in the table, one row for each."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from hope_jax.errors import UserError
from hope_jax.interop.fields import read_json
from hope_jax.interop.gated_deltanet import describe_gated_deltanet
from hope_jax.interop.llama import describe_llama
from hope_jax.interop.mamba2 import describe_mamba2
from hope_jax.interop.qwen3_next import KIND
from hope_jax.interop.rwkv7 import describe_rwkv7, is_of_the_authors
from hope_jax.interop.tensors import INDEX, WEIGHTS, Describe, read_model
from hope_jax.nn.config import ModelConfig

# What config.json has as model_type -> the loader.
ARCHITECTURES: dict[str, Describe] = {
    "llama": describe_llama,
    "mamba2": describe_mamba2,
    "gated_deltanet": describe_gated_deltanet,
    "rwkv7": describe_rwkv7,
}


def load(folder: str | Path, dtype: DTypeLike = jnp.float32) -> tuple[ModelConfig, dict[str, Any]]:
    """The model in a folder and its parameters, as ``LanguageModel(config).init`` would shape them.

    >>> config, params = interop.load("llama-folder", dtype=jnp.bfloat16)
    >>> logits, _ = LanguageModel(config).apply({"params": params}, tokens)

    Tensors are read one at a time into the stacked arrays (float32, or float64 in a float64 model), so the host needs
    room for the parameters and little more. What is not the plain architecture is refused, not approximated.

    Args:
      folder: holds ``config.json``, and ``model.safetensors`` or ``model.safetensors.index.json`` with its shards. The
        files of the authors of RWKV-7 need no ``config.json``.
      dtype: of the model's activations and matrix products; the stored tensors may be of any floating type.

    Raises:
      UserError: a file is missing or unreadable; the architecture is not known; the configuration contradicts itself,
        or has a field that is not known or a part that our model lacks; a tensor is missing, left over, of another
        shape or not of floats; dtype is none of floats.
    """
    path = Path(folder) / "config.json"
    _check_folder(path.parent)
    kind = "rwkv7" if is_of_the_authors(path.parent) else read_json(path).get("model_type")
    if kind == KIND:
        why = "no model here has its experts and gated attention"
        raise UserError(f"{path} has model_type={kind!r}: {why}; load_qwen3_next_layer reads one of its layers.")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError(f"{path} has model_type={kind!r}; those that can be read are {', '.join(ARCHITECTURES)}.")
    return read_model(folder, ARCHITECTURES[kind], dtype)


def _check_folder(folder: Path) -> None:
    """UserError unless it is a folder that holds one of the files of a checkpoint."""
    if not folder.is_dir():
        why = "is no folder" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {why}; expected the folder of a checkpoint, with config.json and {WEIGHTS}.")
    if not any((folder / name).exists() for name in ("config.json", WEIGHTS, INDEX)):
        raise UserError(f"{folder} has neither config.json nor {WEIGHTS}; expected the folder of a checkpoint.")
