"""A Mamba-2 checkpoint of Hugging Face (``Mamba2ForCausalLM``) as the model of the row ``mamba2``.

One stored matrix makes [z | x | B | C | step] and one convolution takes [x | B | C]; here they are the gate, the
convolved map and the decay gate of ``Mamba2``. The norm inside of the layer has no stream to absorb its epsilon, so the
mixer has it. Steps are clipped to ``time_step_limit`` always; transformers 5 does not clip where it reads one token.
"""

import functools
import math
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from hope_jax.errors import UserError
from hope_jax.interop.fields import check_plain, positive, read_json, whole, yes_or_no
from hope_jax.interop.stream import ends, stream_factor
from hope_jax.interop.tensors import Checkpoint, Part, by_layer, maps_in_one, taps
from hope_jax.nn.config import ModelConfig
from hope_jax.nn.mixers.mamba2 import Mamba2Config

EMBEDDING = "backbone.embeddings.weight"
ALIASES = {"backbone.embedding.weight": EMBEDDING}  # older name -> name
PLAIN = {
    "architectures": (["Mamba2ForCausalLM"], None),
    "hidden_act": ("silu", "swish"),
    "use_bias": (False,),
    "use_conv_bias": (True,),
    "rms_norm": (True,),
}
# fmt: off
READ = {  # fields that decide the model and are read below
    "hidden_size", "num_hidden_layers", "num_heads", "head_dim", "state_size", "n_groups", "expand", "conv_kernel",
    "vocab_size", "layer_norm_epsilon", "time_step_limit", "tie_word_embeddings",
}
# Of the start, of the arithmetic, what follows from other fields, and one of older files: transformers gates before
# the norm, whatever it says.
UNUSED = {
    "time_step_rank", "time_step_min", "time_step_max", "time_step_floor", "time_step_scale", "time_step_init_scheme",
    "rescale_prenorm_residual", "chunk_size", "residual_in_fp32", "intermediate_size", "norm_before_gate",
}
# fmt: on
INFINITY = {"__float__": "Infinity"}  # as newer files write it; older ones have the word alone, which JSON has not


def describe_mamba2(path: Path, dtype: DTypeLike) -> Checkpoint:
    """The model and its parts. UserError for biases of the projections, and for widths that contradict each other."""
    fields = read_json(path, "Mamba-2 checkpoint")
    check_plain(path, fields, "mamba2", PLAIN, READ | UNUSED)
    mixer, width, layers = _mixer(fields), whole(fields, "hidden_size"), whole(fields, "num_hidden_layers")
    _check_heads(fields, mixer, width)
    config = ModelConfig(
        mixer=mixer,
        feed_forward=None,
        width=width,
        layers=layers,
        vocab_size=whole(fields, "vocab_size"),
        dtype=dtype,
        tied=yes_or_no(fields, "tie_word_embeddings", False),
    )
    return Checkpoint(config, _parts(config, mixer), aliases=ALIASES)


def _mixer(fields: dict[str, Any]) -> Mamba2Config:
    return Mamba2Config(
        head_size=whole(fields, "head_dim"),
        state=whole(fields, "state_size"),
        groups=whole(fields, "n_groups", 8),
        expand=whole(fields, "expand", 2),
        conv=whole(fields, "conv_kernel", 4),
        step_limits=_limits(fields.get("time_step_limit", [0.0, INFINITY])),
        norm_eps=positive("layer_norm_epsilon", fields.get("layer_norm_epsilon", 1e-5)),
        depth=whole(fields, "num_hidden_layers"),
    )


def _limits(value: Any) -> tuple[float, float]:
    """Smallest and largest step."""
    found = [math.inf if number == INFINITY else number for number in value] if isinstance(value, list) else []
    if len(found) != 2 or not all(isinstance(number, int | float) for number in found) or not 0 <= found[0] < found[1]:
        raise UserError(f"config.json has time_step_limit={value!r}; expected two numbers, 0 <= low < high.")
    return float(found[0]), float(found[1])


def _check_heads(fields: dict[str, Any], mixer: Mamba2Config, width: int) -> None:
    heads = whole(fields, "num_heads")
    if mixer.expand * width != heads * mixer.head_size:
        raise UserError(
            f"config.json has expand * hidden_size = {mixer.expand} * {width} and num_heads * head_dim = "
            f"{heads} * {mixer.head_size}; expected the same number."
        )
    if heads % mixer.groups:
        raise UserError(f"config.json has n_groups={mixer.groups}, which does not divide num_heads={heads}.")


def _parts(config: ModelConfig, mixer: Mamba2Config) -> list[Part]:
    """Every parameter and where it comes from."""
    width, heads, features = config.width, mixer.heads(config.width), mixer.expand * config.width
    inputs = features + 2 * mixer.groups * mixer.state
    layer = functools.partial(by_layer, config.layers, "backbone.layers")
    sizes = {"gate": features, "inputs/project": inputs, "decay/map": heads}
    maps = {f"blocks/mixer/{name}": size for name, size in sizes.items()}
    return [
        *ends(config, mixer.norm_eps, EMBEDDING, "backbone.norm_f.weight"),
        Part("blocks/norm/scale", layer("norm.weight"), (width,)),
        *maps_in_one(layer("mixer.in_proj.weight"), width, maps),
        Part("blocks/mixer/inputs/conv/kernel", layer("mixer.conv1d.weight"), (inputs, 1, mixer.conv), taps),
        Part("blocks/mixer/inputs/conv/bias", layer("mixer.conv1d.bias"), (inputs,)),
        Part("blocks/mixer/decay/step_bias", layer("mixer.dt_bias"), (heads,)),
        Part("blocks/mixer/decay/log_decay", layer("mixer.A_log"), (heads,)),
        Part("blocks/mixer/skip", layer("mixer.D"), (heads,)),
        Part("blocks/mixer/scale", layer("mixer.norm.weight"), (features,)),
        Part(
            "blocks/mixer/down/kernel",
            layer("mixer.out_proj.weight"),
            (width, features),
            factor=stream_factor(mixer.norm_eps),
        ),
    ]
