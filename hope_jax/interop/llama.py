"""Weights from elsewhere: a Llama checkpoint (safetensors, Hugging Face names) as a ``transformer_pp``.

>>> config, params = load_llama("llama-folder", dtype=jnp.bfloat16)
>>> logits, _ = LanguageModel(config).apply({"params": params}, tokens)

The two architectures compute the same function, with two differences that the weights absorb exactly:

* **The norms' epsilon.** Ours is EPS, theirs is e. Let our residual stream be y = c x with c^2 = EPS / e. Then
  y / sqrt(mean(y^2) + EPS) = c x / sqrt(c^2 mean(x^2) + c^2 e) = x / sqrt(mean(x^2) + e): every norm gives what theirs
  gives. y = c x holds if all that is added to the stream is c times theirs: embedding, output and down projections.
* **The embedding.** Our model multiplies its rows by sqrt(D), so they are stored divided by it. A tied head then has
  c / sqrt(D) times their table, and the last norm's scale makes up for it: sqrt(D) / c times theirs. It is divided by
  ``LOGIT_GAIN``, which our logits are multiplied by.

Rotary positions pair feature i with i + K/2 in both, with the scaling (linear or of Llama 3) that a checkpoint has.
"""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from hope_jax.errors import UserError, extra
from hope_jax.interop.llama_config import Llama, read_json, read_llama
from hope_jax.nn.config import ModelConfig
from hope_jax.nn.feed_forward.swiglu import SwiGLUConfig
from hope_jax.nn.language_model import LOGIT_GAIN
from hope_jax.nn.layers import EPS, param_dtype
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.rotary import rope_speeds

with extra("train"):
    from safetensors import SafetensorError, safe_open

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FLOATS = ("F64", "F32", "F16", "BF16")
SPEEDS = "rotary_emb.inv_freq"  # older files hold the rotary speeds, which follow from config.json


def load_llama(folder: str | Path, dtype: DTypeLike = jnp.float32) -> tuple[ModelConfig, dict[str, Any]]:
    """The model in a folder and its parameters, as ``LanguageModel(config).init`` would shape them.

    Tensors are read one at a time into the stacked arrays (float32, or float64 in a float64 model), so the host needs
    room for the parameters and little more. What is not the plain architecture is refused, not approximated.

    Args:
      folder: holds ``config.json``, and ``model.safetensors`` or ``model.safetensors.index.json`` with its shards.
      dtype: of the model's activations and matrix products; the stored tensors may be of any floating type.

    Raises:
      UserError: a file is missing or unreadable; the configuration is not Llama's, contradicts itself, or has other
        rotary positions, biases, heads of another size, another activation or a field that is not known; a tensor is
        missing, left over, of another shape or not of floats; dtype is none of floats.
    """
    folder = Path(folder)
    _check_dtype(dtype)
    llama = read_llama(folder / "config.json")
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
    with contextlib.ExitStack() as stack:
        files = _open(folder, stack)
        parts = _parts(llama)
        _check(files, parts, llama)
        wide = np.dtype(param_dtype(dtype))
        flat = {part.path: jnp.asarray(_leaf(part, files, wide)) for part in parts}
    return config, traverse_util.unflatten_dict(flat, sep="/")


class _Part(NamedTuple):
    """One leaf of the parameters: ``factor * arrange(tensor)``, those of the blocks stacked over the layers."""

    path: str
    names: list[str]  # of its tensors, by layer
    shape: tuple[int, ...]  # of a stored tensor
    arrange: Callable[[np.ndarray], np.ndarray] = np.transpose
    factor: float = 1.0


def _parts(llama: Llama) -> list[_Part]:
    """Every parameter and where it comes from; a stored matrix is [out, in], ours is [in, out]."""
    width, hidden, table = llama.width, llama.hidden, (llama.vocab_size, llama.width)
    stream, root = math.sqrt(EPS / llama.eps), math.sqrt(width)
    shared = (llama.kv_heads * llama.head_size, width)

    def layers(name: str) -> list[str]:
        return [f"model.layers.{i}.{name}.weight" for i in range(llama.layers)]

    head = [] if llama.tied else [_Part("head", [HEAD], table)]
    last = root / stream if llama.tied else 1.0
    return [
        _Part("embedding", [EMBEDDING], table, np.asarray, stream / root),
        _Part("blocks/norm/scale", layers("input_layernorm"), (width,)),
        _Part("blocks/mixer/query/kernel", layers("self_attn.q_proj"), (width, width)),
        _Part("blocks/mixer/key/kernel", layers("self_attn.k_proj"), shared),
        _Part("blocks/mixer/value/kernel", layers("self_attn.v_proj"), shared),
        _Part("blocks/mixer/out/kernel", layers("self_attn.o_proj"), (width, width), factor=stream),
        _Part("blocks/feed_forward/norm/scale", layers("post_attention_layernorm"), (width,)),
        _Part("blocks/feed_forward/gate/kernel", layers("mlp.gate_proj"), (hidden, width)),
        _Part("blocks/feed_forward/up/kernel", layers("mlp.up_proj"), (hidden, width)),
        _Part("blocks/feed_forward/down/kernel", layers("mlp.down_proj"), (width, hidden), factor=stream),
        _Part("norm/scale", ["model.norm.weight"], (width,), factor=last / LOGIT_GAIN),
        *head,
    ]


def _leaf(part: _Part, files: dict[str, Any], wide: np.dtype) -> np.ndarray:
    """The parameter, made of one tensor at a time."""
    leaf = np.empty(0)
    for i, name in enumerate(part.names):
        tensor = part.arrange(files[name].get_tensor(name))
        if i == 0:
            leaf = np.empty((len(part.names), *tensor.shape), wide)
        leaf[i] = tensor
    leaf *= part.factor
    return leaf if part.path.startswith("blocks/") else leaf[0]


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Name of each tensor -> the open file it is in."""
    if (folder / WEIGHTS).exists():
        shards = [WEIGHTS]
    elif (folder / INDEX).exists():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
            raise UserError(f"{folder / INDEX} has no weight_map from tensors to files; download it again.")
        shards = sorted(set(places.values()))
    else:
        raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}; other formats are not read, convert them first.")
    files: dict[str, Any] = {}
    for shard in shards:
        opened = _open_one(folder / shard, stack)
        twice = sorted(files.keys() & set(opened.keys()))
        if twice:
            raise UserError(f"{folder} has the tensor {twice[0]} in two files, one of them {shard}; expected it once.")
        files |= dict.fromkeys(opened.keys(), opened)
    return files


def _open_one(path: Path, stack: contextlib.ExitStack) -> Any:
    if not path.is_file():
        raise UserError(f"{path} is missing, and {INDEX} names it; download it too.")
    try:
        return stack.enter_context(safe_open(path, framework="numpy"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}); download it again.") from error


def _check(files: dict[str, Any], parts: list[_Part], llama: Llama) -> None:
    """All tensors are there, of the right shape and of floats, and nothing else is; read from the headers alone."""
    shapes = {name: part.shape for part in parts for name in part.names}
    missing, over = sorted(shapes.keys() - files.keys()), sorted(files.keys() - shapes.keys())
    if missing:
        raise UserError(f"The tensor {missing[0]} is missing ({len(missing)} in all); config.json asks for it.")
    for name, shape in shapes.items():
        header = files[name].get_slice(name)
        found, kind = tuple(header.get_shape()), header.get_dtype()
        if found != shape:
            raise UserError(f"The tensor {name} has the shape {list(found)}; config.json asks for {list(shape)}.")
        if kind not in FLOATS:
            raise UserError(f"The tensor {name} is of type {kind}; expected one of {', '.join(FLOATS)}.")
    for name in over:
        _check_left_over(name, files, llama)


def _check_left_over(name: str, files: dict[str, Any], llama: Llama) -> None:
    """What follows from the rest may be there: rotary speeds, and in a tied model the head if it is the embedding."""
    if name == HEAD and llama.tied:
        if not np.array_equal(files[HEAD].get_tensor(HEAD), files[EMBEDDING].get_tensor(EMBEDDING)):
            why = f"config.json says that the head is tied, and it differs from {EMBEDDING}"
            raise UserError(f"The tensor {HEAD} is left over: {why}.")
    elif not (name.endswith(SPEEDS) and _speeds_follow(files[name].get_tensor(name), llama)):
        raise UserError(f"The tensor {name} is left over; the model would lack it.")


def _check_dtype(dtype: DTypeLike) -> None:
    try:
        floats = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floats = False
    if not floats:
        raise UserError(f"dtype is {dtype!r}; expected a type of floats, such as jnp.float32 or jnp.bfloat16.")


def _speeds_follow(stored: np.ndarray, llama: Llama) -> bool:
    """Whether stored rotary speeds are those of the base, scaled or not, up to the rounding of 16 bits."""
    of_base, scaled = (
        np.asarray(rope_speeds(llama.head_size, llama.rope_base, scaling, jnp.float32))
        for scaling in (None, llama.rope_scaling)
    )
    return stored.shape == of_base.shape and any(
        np.allclose(stored.astype(float), speeds, rtol=2**-8, atol=1e-6) for speeds in (of_base, scaled)
    )
