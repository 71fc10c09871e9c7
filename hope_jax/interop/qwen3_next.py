"""The linear attention layers of Qwen3-Next (Hugging Face names), which are Gated DeltaNets, one at a time.

No model of this library has Qwen3-Next's experts and gated attention, so that its whole cannot be loaded. A layer is
read alone, from the files that hold it. One stored matrix has the rows of [q | k | v | z] of each key head in turn,
another those of [rate | decay]; one convolution takes q of all heads, then k, then v.
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from hope_jax import errors
from hope_jax.errors import UserError
from hope_jax.interop.fields import positive, read_json, whole
from hope_jax.interop.tensors import Part, Tensors, check_dtype, maps_in_one, taps
from hope_jax.nn.mixers.gated_deltanet import GatedDeltaNetConfig

KIND = "qwen3_next"
LINEAR = "linear_attention"


def load_qwen3_next_layer(
    folder: str | Path, index: int, dtype: DTypeLike = jnp.float32
) -> tuple[GatedDeltaNetConfig, dict[str, Any]]:
    """The mixer of one block and its parameters, for a layer that computes in ``dtype``.

    >>> mixer, params = load_qwen3_next_layer("qwen3-next-folder", 0)
    >>> layer = mixer.build(width=2048, dtype=jnp.float32)
    >>> y, state = layer.apply({"params": params}, u, layer.init_state(batch=1, capacity=0))

    ``u`` [B,T,D] is what the norm of the block gives. That norm is not a part of the layer; its scales are stored minus
    1, unlike those of the norm inside of the layer.

    Args:
      folder: as for ``load``; of several files only those that hold the layer must be there.
      index: of the block, from 0.
      dtype: as for ``load``.

    Raises:
      UserError: as ``load``, and for a block that is none of linear attention.
    """
    folder, index = Path(folder), errors.whole("index", index, 0)
    check_dtype(dtype)
    fields = _read_fields(folder / "config.json", index)
    mixer, width = _mixer(fields), whole(fields, "hidden_size")
    place = f"model.layers.{index}.linear_attn."
    parts = list(_parts(mixer, width, place))
    with contextlib.ExitStack() as stack:
        tensors = Tensors(folder, stack, aliases={}, prefix=place)
        tensors.check(parts)
        if over := sorted(tensors.names.difference(*(part.names for part in parts))):
            raise UserError(f"The tensor {over[0]} is left over; the layer would lack it.")
        return mixer, tensors.params(parts, dtype)


def _read_fields(path: Path, index: int) -> dict[str, Any]:
    """The fields. UserError unless it is a Qwen3-Next whose block ``index`` has linear attention."""
    fields = read_json(path, "Qwen3-Next checkpoint")
    for field, expected, found in (
        ("model_type", KIND, fields.get("model_type")),
        ("hidden_act", "silu", fields.get("hidden_act", "silu")),
    ):
        if found != expected:
            raise UserError(f"{path} has {field}={found!r}; only {expected!r} can be read.")
    layers, every = whole(fields, "num_hidden_layers"), whole(fields, "full_attention_interval", 4)
    kinds = fields.get("layer_types") or [LINEAR if (i + 1) % every else "full_attention" for i in range(layers)]
    if not isinstance(kinds, list):
        raise UserError(f"{path} has layer_types={kinds!r}; expected a list, one word for each block.")
    linear = [i for i, kind in enumerate(kinds) if kind == LINEAR]
    if index not in linear:
        found = ", ".join(map(str, linear)) or "none"
        raise UserError(f"index is {index}; the blocks with linear attention are {found}.")
    return fields


def _mixer(fields: dict[str, Any]) -> GatedDeltaNetConfig:
    heads, value_heads = whole(fields, "linear_num_key_heads", 16), whole(fields, "linear_num_value_heads", 32)
    if value_heads % heads:
        which = f"linear_num_value_heads={value_heads}, which linear_num_key_heads={heads}"
        raise UserError(f"config.json has {which} does not divide.")
    return GatedDeltaNetConfig(
        heads,
        key_size=whole(fields, "linear_key_head_dim", 128),
        value_size=whole(fields, "linear_value_head_dim", 128),
        values_per_key=value_heads // heads,
        conv=whole(fields, "linear_conv_kernel_dim", 4),
        norm_eps=positive("rms_norm_eps", fields.get("rms_norm_eps", 1e-6)),
    )


def _parts(mixer: GatedDeltaNetConfig, width: int, place: str) -> Iterator[Part]:
    """Every parameter and where it comes from; ``place`` is in front of every name."""
    heads, keys, ratio = mixer.value_heads, mixer.heads * mixer.key_size, mixer.values_per_key
    values, key, value = heads * mixer.value_size, mixer.key_size, ratio * mixer.value_size
    streams = {"query/project": key, "key/project": key, "value/project": value, "out/gate": value}
    yield from maps_in_one([place + "in_proj_qkvz.weight"], width, streams, mixer.heads)
    gates = {"rate": ratio, "decay/map": ratio}
    yield from maps_in_one([place + "in_proj_ba.weight"], width, gates, mixer.heads)
    start, channels = 0, 2 * keys + values
    for name, size in {"query": keys, "key": keys, "value": values}.items():
        cut = functools.partial(_some_taps, start, start + size)
        yield Part(f"{name}/conv/kernel", [place + "conv1d.weight"], (channels, 1, mixer.conv), cut)
        start += size
    yield Part("decay/step_bias", [place + "dt_bias"], (heads,))
    yield Part("decay/log_decay", [place + "A_log"], (heads,))
    yield Part("out/scale", [place + "norm.weight"], (mixer.value_size,))
    yield Part("out/down/kernel", [place + "out_proj.weight"], (width, values))


def _some_taps(start: int, stop: int, kernel: np.ndarray) -> np.ndarray:
    return taps(kernel[start:stop])
