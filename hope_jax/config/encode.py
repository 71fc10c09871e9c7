"""Values of a configuration as JSON; see the table of the package. Read ``decode.py`` next."""

import enum
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hope_jax.config.names import fields_of, join, name_of, shown
from hope_jax.errors import UserError

Json = Any


def encode(value: Any, name: str) -> Json:
    """The value of field ``name``, which is dotted. Raises UserError for a value that JSON cannot stand for."""
    if isinstance(value, enum.Enum):
        return {"enum": name_of(type(value), name), "name": value.name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Path):
        return {"path": str(value)}
    if _is_dtype(value):
        return {"dtype": np.dtype(value).name}
    return _encode_composed(value, name)


def _encode_composed(value: Any, name: str) -> Json:
    if fields_of(value) is not None and not isinstance(value, type):
        fields = {field: encode(getattr(value, field), join(name, field)) for field in fields_of(value) or ()}
        return {"class": name_of(type(value), name)} | fields
    if isinstance(value, tuple):
        return [encode(item, join(name, i)) for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"mapping": {key: encode(item, join(name, key)) for key, item in value.items()}}
    if isinstance(value, functools.partial):
        arguments = [encode(item, join(name, i)) for i, item in enumerate(value.args)]
        keywords = {key: encode(item, join(name, key)) for key, item in value.keywords.items()}
        return {"function": name_of(value.func, name), "arguments": arguments, "keywords": keywords}
    if callable(value):
        return {"function": name_of(value, name)}
    raise UserError(f"{shown(name)} is a {type(value).__name__}, which a saved configuration cannot hold")


def _is_dtype(value: Any) -> bool:
    """Whether ``value`` is a dtype, or a type of scalars such as ``np.float32`` and ``jnp.float32``."""
    numpys = isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic))
    return numpys or (callable(value) and isinstance(getattr(value, "dtype", None), np.dtype))
