"""Names of classes and functions, names of fields: how a configuration refers to things."""

import dataclasses
import functools
import importlib
from typing import Any

from hope_jax.errors import UserError

PUBLIC = ("jax.nn", "optax", "optax.contrib")
"""Modules of other packages whose public functions a configuration may name, such as an activation."""


def join(name: str, part: Any) -> str:
    """The dotted name of a part of field ``name``."""
    return f"{name}.{part}" if name else str(part)


def shown(name: str) -> str:
    """A dotted name as the subject of a sentence."""
    return name or "the configuration"


def fields_of(value: Any) -> list[str] | None:
    """Names of the fields of a dataclass or named tuple (its class or an instance); None for anything else."""
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value) if field.init]
    return list(value._fields) if hasattr(value, "_fields") and hasattr(value, "_asdict") else None


def name_of(thing: Any, name: str) -> str:
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
