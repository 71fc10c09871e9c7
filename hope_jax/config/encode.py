"""Values of a configuration as JSON (see the table of the package), and by dotted names. Read ``decode.py`` next."""

import dataclasses
import enum
import functools
import importlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hope_jax.errors import UserError

Json = Any
PUBLIC = ("jax.nn", "optax", "optax.contrib")
"""Modules of other packages whose public functions a configuration may name, such as an activation."""


def encode(value: Any, name: str) -> Json:
    """The value of field ``name``, which is dotted. Raises UserError for a value that JSON cannot stand for."""
    if isinstance(value, enum.Enum):
        return {"enum": _name_of(type(value), name), "name": value.name}
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
    fields = None if isinstance(value, type) else fields_of(value)
    if fields is not None:
        encoded = {field: encode(getattr(value, field), join(name, field)) for field in fields}
        return {"class": _name_of(type(value), name)} | encoded
    if isinstance(value, tuple):
        return [encode(item, join(name, i)) for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"mapping": {key: encode(item, join(name, key)) for key, item in value.items()}}
    if isinstance(value, functools.partial):
        arguments = [encode(item, join(name, i)) for i, item in enumerate(value.args)]
        keywords = {key: encode(item, join(name, key)) for key, item in value.keywords.items()}
        return {"function": _name_of(value.func, name), "arguments": arguments, "keywords": keywords}
    if callable(value):
        return {"function": _name_of(value, name)}
    raise UserError(f"{shown(name)} is a {type(value).__name__}, which a saved configuration cannot hold")


def _is_dtype(value: Any) -> bool:
    """Whether ``value`` is a dtype, or a type of scalars such as ``np.float32`` and ``jnp.float32``."""
    numpys = isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic))
    return numpys or (callable(value) and isinstance(getattr(value, "dtype", None), np.dtype))


def _name_of(thing: Any, name: str) -> str:
    """``module:name`` by which a class or function can be imported. Raises UserError, naming the field, if none."""
    places = [(getattr(thing, "__module__", None) or "", getattr(thing, "__qualname__", None) or "")]
    places += [(module, getattr(thing, "__name__", "")) for module in PUBLIC]  # theirs are defined in private modules
    for module, qualname in places:
        if not any(part.startswith("_") for part in module.split(".")) and find(module, qualname) is thing:
            return f"{module}:{qualname}"
    raise UserError(
        f"{shown(name)} is {getattr(thing, '__qualname__', thing)!r}, which cannot be imported by a name; "
        "use a function or class at the top of a module"
    )


def find(module: str, qualname: str) -> Any:
    """What ``qualname`` is in ``module``; None where there is no such thing."""
    try:
        return functools.reduce(getattr, qualname.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError):
        return None


def fields_of(value: Any) -> list[str] | None:
    """Names of the fields of a dataclass or named tuple (its class or an instance); None for anything else."""
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value) if field.init]
    return list(value._fields) if hasattr(value, "_fields") and hasattr(value, "_asdict") else None


def join(name: str, part: Any) -> str:
    """The dotted name of a part of field ``name``."""
    return f"{name}.{part}" if name else str(part)


def shown(name: str) -> str:
    """A dotted name as the subject of a sentence."""
    return name or "the configuration"


def flatten(config: Any) -> dict[str, Any]:
    """Dotted field name -> number, text or list, through everything nested, of a dataclass or a mapping.

    The class of a nested dataclass counts too: it is the entry of the field's own name.
    """
    return flatten_json(encode(config, ""))


def flatten_json(data: Json) -> dict[str, Any]:
    """``flatten`` of a configuration that is JSON already: also of one that this version cannot read any more."""
    flat = dict(_flat(data, ""))
    flat.pop("", None)
    return flat


def _flat(data: Json, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict) and data.keys() == {"mapping"}:
        items = data["mapping"]
    elif isinstance(data, dict) and (len(data) > 1 or "class" in data):
        items = {key: item for key, item in data.items() if key != "class"}
        if "class" in data:
            yield name, data["class"]
    elif isinstance(data, list) and any(isinstance(item, dict) for item in data):
        items = dict(enumerate(data))
    else:  # an object of one entry is a function, dtype, path or float by its name alone
        items = {}
        yield name, next(iter(data.values())) if isinstance(data, dict) else data
    for key, item in items.items():
        yield from _flat(item, join(name, key))


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to continue the run in ``folder`` with another configuration; both as ``flatten`` gives them.

    Raises:
      UserError: naming every field that differs, with both values.
    """
    names = sorted(saved.keys() | now.keys())
    pairs = [(name, saved.get(name, "absent"), now.get(name, "absent")) for name in names]
    differing = [f"{name} is {old} there and {new} here" for name, old, new in pairs if old != new]
    if differing:
        raise UserError(
            f"The run folder {folder} belongs to another configuration: {'; '.join(differing)}. Use the same values to "
            "continue it or another run folder to start anew."
        )
