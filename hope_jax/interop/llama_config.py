"""``config.json`` of a Llama checkpoint: the sizes, and a refusal of everything that is not the plain architecture.

Fields that are not there have the format's own defaults. Rotary positions are plain, linear or of Llama 3; three places
may name their base and two their scaling, and places that contradict each other are refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hope_jax.errors import UserError
from hope_jax.interop.fields import check_plain, positive, read_json, whole, yes_or_no
from hope_jax.nn.rotary import RopeScaling

# What the model must be: field -> the values that say so; the first is the default, None is a JSON null.
PLAIN = {
    "architectures": (["LlamaForCausalLM"], None),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
}
# fmt: off
READ = {  # fields that decide the model and are read below
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "tie_word_embeddings",
}
# fmt: on
ROPES = ("rope_scaling", "rope_parameters")  # where older and newer files say what the rotary positions are
ROPE_FIELDS = {  # of each type, what must be there; a base and the context may be
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
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
    rope_scaling: RopeScaling | None
    tied: bool

    @property
    def head_size(self) -> int:
        """Features of a head."""
        return self.width // self.heads


def read_llama(path: Path) -> Llama:
    """The sizes in ``config.json``. UserError, naming the field, for a model that is not a plain Llama."""
    config = read_json(path, "Llama checkpoint")
    check_plain(path, config, "llama", PLAIN, READ)
    heads = whole(config, "num_attention_heads")
    rope_base, rope_scaling = _rope(config)
    llama = Llama(
        width=whole(config, "hidden_size"),
        hidden=whole(config, "intermediate_size"),
        layers=whole(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=whole(config, "num_key_value_heads", heads),
        vocab_size=whole(config, "vocab_size"),
        context=whole(config, "max_position_embeddings", 2048),
        eps=positive("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        tied=yes_or_no(config, "tie_word_embeddings", False),
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


def _rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling. UserError for other rotary positions, naming the field, and for contradictions."""
    found = {place: config[place] for place in ROPES if config.get(place)}
    scalings = {place: _scaling(place, rope) for place, rope in found.items()}
    bases = {f"{place}.rope_theta": rope["rope_theta"] for place, rope in found.items() if "rope_theta" in rope}
    if config.get("rope_theta") is not None:
        bases["rope_theta"] = config["rope_theta"]
    base = _agreed({name: positive(name, value) for name, value in bases.items()}, 10_000.0)
    return base, _agreed(scalings, None)


def _agreed(values: dict[str, Any], default: Any) -> Any:
    """The one value that all places give."""
    (first, value), *others = values.items() or [("", default)]
    for name, other in others:
        if other != value:
            raise UserError(f"config.json contradicts itself: {first} is {value} and {name} is {other}.")
    return value


def _scaling(place: str, rope: Any) -> RopeScaling | None:
    """None where the positions are plain."""
    if not isinstance(rope, dict):
        raise UserError(f"config.json has {place}={rope!r}; expected an object of named fields.")
    kind = _agreed({f"{place}.{name}": rope[name] for name in ("rope_type", "type") if name in rope}, "default")
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        kinds = ", ".join(ROPE_FIELDS)
        raise UserError(f"config.json has {place}={rope!r}; only rotary positions of the types {kinds} can be read.")
    known = {"rope_type", "type", "rope_theta", "original_max_position_embeddings", *ROPE_FIELDS[kind]}
    for name, value in rope.items():
        if name not in known and not (name == "partial_rotary_factor" and value in (None, 1)):
            raise UserError(f"config.json has {place}.{name}={value!r}; rotary positions of that kind cannot be read.")
    numbers = [positive(f"{place}.{name}", rope.get(name)) for name in ROPE_FIELDS[kind]]
    return None if kind == "default" or numbers[0] == 1 else _built(place, rope, *numbers)


def _built(
    place: str, rope: Any, factor: float, low: float = 1.0, high: float = 4.0, context: float | None = None
) -> RopeScaling:
    if context is not None and context != int(context):
        field = f"{place}.original_max_position_embeddings"
        raise UserError(f"config.json has {field}={context}; expected a number of tokens.")
    try:
        return RopeScaling(factor, None if context is None else int(context), low, high)
    except UserError as error:
        raise UserError(f"config.json has {place}={rope!r}: {error}") from error
