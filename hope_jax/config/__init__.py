"""Configurations as JSON and back: ``from_json(to_json(config)) == config`` for every frozen dataclass of typed values.

A value becomes JSON as follows; whatever is not in this table is refused when it is written.

=======================  =====================================================================================
None, bool, int, float,  themselves; a float that JSON does not know is ``{"float": "inf"}``
str
tuple                    a list
mapping with str keys    ``{"mapping": {...}}``
dataclass, named tuple   ``{"class": "hope_jax.levels:Level", "period": 64}``; a field cannot be called "class"
function, class          ``{"function": "hope_jax.memory.objectives:l2"}``, the name that it can be imported by
functools.partial        ``{"function": ..., "arguments": [...], "keywords": {...}}``
enum member              ``{"enum": "package.module:Color", "name": "RED"}``
dtype, path              ``{"dtype": "float32"}``, ``{"path": "runs/x"}``
=======================  =====================================================================================

Reading imports nothing but modules of the packages that the caller trusts (``hope_jax`` unless told otherwise) and the
modules ``PUBLIC``, and calls nothing but the classes of dataclasses, named tuples and enums: a file that somebody sent
cannot run other code. What was read is checked against the types of the fields.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from hope_jax.config.decode import Reader
from hope_jax.config.encode import PUBLIC, Json, check_same, encode, flatten, flatten_json

TRUSTED = ("hope_jax",)
"""Packages whose classes and functions a configuration may name."""

T = TypeVar("T")

__all__ = ["PUBLIC", "TRUSTED", "check_same", "flatten", "flatten_json", "from_json", "to_json"]


def to_json(config: Any) -> Json:
    """``config`` as values of JSON. Raises UserError for values that have no form there, such as a lambda."""
    return encode(config, "")


def from_json(data: Json, expected: type[T] | Any = Any, trusted: Sequence[str] = TRUSTED) -> T:
    """The configuration that ``to_json`` wrote.

    Args:
      data: what ``json.loads`` gave.
      expected: the class, or another type, that the configuration must have.
      trusted: top-level packages whose classes and functions may be named.

    Raises:
      UserError: a name that cannot be found, an unknown or missing field, a value of the wrong type or outside its
        range. The message names the field with dots, such as ``mixer.heads``.
    """
    return Reader(tuple(trusted)).value(data, expected, "")
