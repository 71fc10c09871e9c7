"""The rotary positions of a Llama's ``config.json``: plain, linear or of Llama 3.

Three places may name the base and two the scaling; places that contradict each other are refused. Read ``llama.py``
next: it reads the weights.
"""

from typing import Any

import numpy as np

from hope_jax.errors import UserError
from hope_jax.nn.rotary import RopeScaling

PLACES = ("rope_scaling", "rope_parameters")  # of older and of newer files
FIELDS = {  # of each type, what must be there; a base and the context may be
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling. UserError for other rotary positions, naming the field, and for contradictions."""
    found = {place: config[place] for place in PLACES if config.get(place)}
    scalings = {place: _scaling(place, rope) for place, rope in found.items()}
    bases = {f"{place}.rope_theta": rope["rope_theta"] for place, rope in found.items() if "rope_theta" in rope}
    if config.get("rope_theta") is not None:
        bases["rope_theta"] = config["rope_theta"]
    base = _agreed({name: positive(name, value) for name, value in bases.items()}, 10_000.0)
    return base, _agreed(scalings, None)


def positive(field: str, value: Any) -> float:
    """The number. UserError unless it is a positive and finite float32: that is what a model computes with."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    limits = np.finfo(np.float32)
    if not number or not float(limits.tiny) <= value <= float(limits.max):
        raise UserError(f"config.json has {field}={value!r}; expected a positive number.")
    return float(value)


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
    if not isinstance(kind, str) or kind not in FIELDS:
        raise UserError(f"config.json has {place}={rope!r}; only rotary positions of the types {', '.join(FIELDS)} can "
                        "be read.")  # fmt: skip
    known = {"rope_type", "type", "rope_theta", *FIELDS[kind]} | {"original_max_position_embeddings"}
    for name, value in rope.items():
        if name not in known and not (name == "partial_rotary_factor" and value in (None, 1)):
            raise UserError(f"config.json has {place}.{name}={value!r}; rotary positions of that kind cannot be read.")
    numbers = {name: positive(f"{place}.{name}", rope.get(name)) for name in FIELDS[kind]}
    return None if numbers.get("factor", 1.0) == 1 else _checked(kind, place, rope, numbers)


def _checked(kind: str, place: str, rope: Any, numbers: dict[str, float]) -> RopeScaling:
    if kind == "linear":
        arguments: dict[str, Any] = {}
    else:
        context = numbers["original_max_position_embeddings"]
        if context != int(context):
            raise UserError(f"config.json has {place}.original_max_position_embeddings={context}; expected a number of "
                            "tokens.")  # fmt: skip
        arguments = {"context": int(context), "low": numbers["low_freq_factor"], "high": numbers["high_freq_factor"]}
    try:
        return RopeScaling(numbers["factor"], **arguments)
    except UserError as error:
        raise UserError(f"config.json has {place}={rope!r}: {error}") from error
