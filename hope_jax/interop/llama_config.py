"""``config.json`` of a Llama checkpoint: the sizes, and a refusal of everything that is not the plain architecture.

Fields that are not there have the format's own defaults. Read ``pretrained.py`` next: it reads the weights.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hope_jax.errors import UserError

# What the model must be: field -> the values that say so; the first is the default, None is a JSON null.
PLAIN = {
    "architectures": (["LlamaForCausalLM"], None),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
}


@dataclass(frozen=True)
class Llama:
    """Sizes of a Llama: features D, hidden features, blocks, query heads, key and value heads, ...

    ``eps``: the norms' epsilon. ``tied``: the head is the embedding.
    """

    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    context: int
    eps: float
    rope_base: float
    tied: bool

    @property
    def head_size(self) -> int:
        """Features of a head."""
        return self.width // self.heads


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. UserError if the file is missing, no JSON, or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); expected a Llama checkpoint.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}; expected an object of named fields.")
    return value


def read_llama(path: Path) -> Llama:
    """The sizes in ``config.json``. UserError, naming the field, for a model that is not a plain Llama."""
    config = read_json(path)
    if config.get("model_type") != "llama":
        raise UserError(f"{path} has model_type={config.get('model_type')!r}; only 'llama' can be read.")
    for field, values in PLAIN.items():
        if (found := config.get(field, values[0])) not in values:
            raise UserError(f"{path} has {field}={found!r}; only {values[0]!r} can be read.")
    heads = _whole(config, "num_attention_heads")
    llama = Llama(
        width=_whole(config, "hidden_size"),
        hidden=_whole(config, "intermediate_size"),
        layers=_whole(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=_whole(config, "num_key_value_heads", heads),
        vocab_size=_whole(config, "vocab_size"),
        context=_whole(config, "max_position_embeddings", 2048),
        eps=_positive("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        rope_base=_rope_base(config),
        tied=_tied(config),
    )
    _check_heads(llama, config.get("head_dim"))
    return llama


def _check_heads(llama: Llama, head_dim: Any) -> None:
    if llama.width % llama.heads or head_dim not in (None, llama.head_size):
        raise UserError(
            f"config.json has hidden_size={llama.width}, num_attention_heads={llama.heads} and head_dim={head_dim}; "
            "only heads of hidden_size / num_attention_heads features can be read."
        )
    if llama.heads % llama.kv_heads:
        raise UserError(
            f"config.json has num_key_value_heads={llama.kv_heads}, which does not divide num_attention_heads="
            f"{llama.heads}."
        )


def _rope_base(config: dict[str, Any]) -> float:
    """The base of unscaled rotary positions; newer files keep it in ``rope_parameters``."""
    for field in ("rope_scaling", "rope_parameters"):
        rope = config.get(field) or {}
        plain = isinstance(rope, dict) and rope.keys() <= {"rope_type", "type", "rope_theta"}
        if not plain or {rope.get("rope_type", "default"), rope.get("type", "default")} != {"default"}:
            raise UserError(f"config.json has {field}={rope!r}; only unscaled rotary positions can be read.")
    inner = config.get("rope_parameters") or {}
    return _positive("rope_theta", inner.get("rope_theta", config.get("rope_theta", 10_000.0)))


def _tied(config: dict[str, Any]) -> bool:
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f"config.json has tie_word_embeddings={tied!r}; expected true or false.")
    return tied


def _whole(config: dict[str, Any], field: str, default: int | None = None) -> int:
    value = default if config.get(field) is None else config[field]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json has {field}={value!r}; expected a whole number of at least 1.")
    return value


def _positive(field: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"config.json has {field}={value!r}; expected a positive number.")
    return float(value)
