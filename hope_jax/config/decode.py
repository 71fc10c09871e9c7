"""A configuration back from JSON, every field checked against its type, as far as types can be checked at run time."""

import collections.abc
import dataclasses
import enum
import functools
import inspect
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np

from hope_jax.config.encode import PUBLIC, Json, fields_of, find, join, shown
from hope_jax.errors import UserError, closest


@dataclasses.dataclass(frozen=True)
class Reader:
    """Turns JSON back into values of the types that are expected; ``name`` is where in the configuration it stands."""

    trusted: tuple[str, ...]

    def value(self, data: Json, expected: Any, name: str) -> Any:
        """The value of field ``name``. Raises UserError where it is none of type ``expected``."""
        found = self._decode(data, expected, name)
        if type(found) is int and float in _alternatives(expected) and not _fits(found, expected):
            found = float(found)
        if not _fits(found, expected):
            raise UserError(f"{shown(name)} is {found!r}; expected {_type_name(expected)}")
        return found

    def _decode(self, data: Json, expected: Any, name: str) -> Any:
        if isinstance(data, list):
            items = enumerate(zip(data, _item_types(expected, len(data)), strict=True))
            return tuple(self.value(item, kind, join(name, i)) for i, (item, kind) in items)
        if not isinstance(data, dict):
            return data
        tags = {"class": self._instance, "function": self._function, "enum": self._member, "mapping": self._mapping}
        for tag, decode in tags.items():
            if tag in data:
                return decode(data, name)
        return self._scalar(data, name)

    def _scalar(self, data: dict[str, Any], name: str) -> Any:
        makers = {"float": float, "path": Path, "dtype": np.dtype}
        if len(data) != 1 or not data.keys() <= makers.keys():
            raise UserError(f"{shown(name)} has the entries {sorted(data)}; expected a value as hope_jax writes it")
        ((kind, text),) = data.items()
        try:
            return makers[kind](text)
        except (TypeError, ValueError) as error:
            raise UserError(f"{shown(name)} is {text!r}; expected a {kind}") from error

    def _mapping(self, data: dict[str, Any], name: str) -> dict[str, Any]:
        if not isinstance(data["mapping"], dict):
            raise UserError(f"{shown(name)} is {data['mapping']!r}; expected a mapping")
        return {key: self.value(item, Any, join(name, key)) for key, item in data["mapping"].items()}

    def _member(self, data: dict[str, Any], name: str) -> Any:
        kind = self._named(data["enum"], name)
        if not (isinstance(kind, type) and issubclass(kind, enum.Enum)) or data.get("name") not in list(
            kind.__members__
        ):
            raise UserError(f"{shown(name)} is {data.get('name')!r}; expected a member of {data['enum']}")
        return kind[data["name"]]

    def _function(self, data: dict[str, Any], name: str) -> Any:
        function = self._named(data["function"], name)
        if not callable(function):
            raise UserError(f"{shown(name)} names {data['function']}, which is no function")
        if data.keys() == {"function"}:
            return function
        given, named = data.get("arguments"), data.get("keywords")
        if not isinstance(given, list) or not isinstance(named, dict):
            raise UserError(
                f"{shown(name)} is {data['function']} with arguments {given!r} and {named!r}; expected a list and names"
            )
        keywords = {key: self.value(item, Any, join(name, key)) for key, item in named.items()}
        return functools.partial(function, *self.value(given, Any, name), **keywords)

    def _instance(self, data: dict[str, Any], name: str) -> Any:
        kind = self._named(data["class"], name)
        fields = fields_of(kind) if isinstance(kind, type) else None
        if fields is None:
            raise UserError(f"{shown(name)} names {data['class']}, which is no configuration")
        given = {key: item for key, item in data.items() if key != "class"}
        for key in given:
            if key not in fields:
                raise UserError(f"{join(name, key)} is no field of {kind.__name__}; {closest(key, fields)}")
        if missing := [field for field in fields if field not in given]:
            raise UserError(f"{join(name, missing[0])} is missing; {kind.__name__} needs it")
        hints = typing.get_type_hints(kind)
        values = {key: self.value(item, hints.get(key, Any), join(name, key)) for key, item in given.items()}
        try:
            return kind(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{shown(name)} is not valid: {error}") from error

    def _named(self, reference: Any, name: str) -> Any:
        """The class or function that ``module:name`` refers to."""
        module, _, qualname = reference.partition(":") if isinstance(reference, str) else ("", "", "")
        if module.split(".")[0] not in self.trusted and module not in PUBLIC:
            packages = ", ".join(self.trusted)
            raise UserError(f"{shown(name)} names {reference!r}; only what belongs to {packages} may be read")
        found = find(module, qualname)
        # Modules import others: what is reached through one must be its own.
        owner = getattr(found, "__module__", "").split(".")[0] if found is not None else ""
        if found is None or inspect.ismodule(found) or (module not in PUBLIC and owner not in self.trusted):
            raise UserError(f"{shown(name)} names {reference!r}, which does not exist in this version of hope_jax")
        return found


def _item_types(expected: Any, count: int) -> list[Any]:
    """The type of each of ``count`` items, where ``expected`` says it."""
    for option in _alternatives(expected):
        if get_origin(option) is tuple:
            inner = get_args(option)
            if len(inner) == 2 and inner[1] is Ellipsis:
                return [inner[0]] * count
            if len(inner) == count:
                return list(inner)
    return [Any] * count


def _alternatives(expected: Any) -> tuple[Any, ...]:
    """The alternatives of a union; any other type is the only one."""
    return get_args(expected) if get_origin(expected) in (Union, types.UnionType) else (expected,)


def _fits(value: Any, expected: Any) -> bool:
    """Whether ``value`` has the type ``expected``; types that say nothing at run time accept everything."""
    return any(_fits_kind(value, option) for option in _alternatives(expected))


def _fits_kind(value: Any, expected: Any) -> bool:
    origin, inner = get_origin(expected), get_args(expected)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        whole = isinstance(value, tuple) and (len(inner) == len(value) or Ellipsis in inner)
        return whole and all(map(_fits, value, _item_types(expected, len(value))))
    if origin is collections.abc.Callable:
        return callable(value)
    if not isinstance(expected, type) or origin is not None:
        return True
    if expected in (int, float) and isinstance(value, bool):
        return False
    try:
        return isinstance(value, expected)
    except TypeError:  # a protocol that cannot be checked
        return True


def _type_name(expected: Any) -> str:
    """A type in words, for a message."""
    if get_origin(expected) is Literal:
        return "one of " + ", ".join(map(repr, get_args(expected)))
    names = (getattr(option, "__name__", str(option)) for option in _alternatives(expected))
    return " or ".join(names).replace("NoneType", "None")
