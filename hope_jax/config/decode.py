"""A configuration back from JSON, with every field checked. Read ``fits.py`` next."""

import dataclasses
import enum
import functools
import inspect
import typing
from pathlib import Path
from typing import Any

import numpy as np

from hope_jax.config.encode import Json
from hope_jax.config.fits import alternatives, fits, item_types, type_name
from hope_jax.config.names import PUBLIC, fields_of, find, join, shown
from hope_jax.errors import UserError, closest


@dataclasses.dataclass(frozen=True)
class Reader:
    """Turns JSON back into values of the types that are expected; ``name`` is where in the configuration it stands."""

    trusted: tuple[str, ...]

    def value(self, data: Json, expected: Any, name: str) -> Any:
        """The value of field ``name``. Raises UserError where it is none of type ``expected``."""
        found = self._decode(data, expected, name)
        if type(found) is int and float in alternatives(expected) and not fits(found, expected):
            found = float(found)
        if not fits(found, expected):
            raise UserError(f"{shown(name)} is {found!r}; expected {type_name(expected)}")
        return found

    def _decode(self, data: Json, expected: Any, name: str) -> Any:
        if isinstance(data, list):
            inner = item_types(expected, len(data))
            items = enumerate(zip(data, inner, strict=True))
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
        if not (isinstance(kind, type) and issubclass(kind, enum.Enum)) or data.get("name") not in kind.__members__:
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
        if not isinstance(kind, type) or fields_of(kind) is None:
            raise UserError(f"{shown(name)} names {data['class']}, which is no configuration")
        given = {key: item for key, item in data.items() if key != "class"}
        fields = fields_of(kind) or []
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
