"""Whether a value has the type that a field declares, as far as types can be checked at run time."""

import collections.abc
import types
from typing import Any, Literal, Union, get_args, get_origin


def item_types(expected: Any, count: int) -> list[Any]:
    """The type of each of ``count`` items, where ``expected`` says it."""
    for option in alternatives(expected):
        if get_origin(option) is tuple:
            inner = get_args(option)
            if len(inner) == 2 and inner[1] is Ellipsis:
                return [inner[0]] * count
            if len(inner) == count:
                return list(inner)
    return [Any] * count


def alternatives(expected: Any) -> tuple[Any, ...]:
    """The alternatives of a union; any other type is the only one."""
    return get_args(expected) if get_origin(expected) in (Union, types.UnionType) else (expected,)


def fits(value: Any, expected: Any) -> bool:
    """Whether ``value`` has the type ``expected``; types that say nothing at run time accept everything."""
    return any(_fits_kind(value, option) for option in alternatives(expected))


def _fits_kind(value: Any, expected: Any) -> bool:
    origin = get_origin(expected)
    if origin is Literal:
        return value in get_args(expected)
    if origin is tuple or expected is tuple:
        inner = item_types(expected, len(value)) if isinstance(value, tuple) else []
        exact = len(get_args(expected)) in (0, len(inner)) or Ellipsis in get_args(expected)
        return isinstance(value, tuple) and exact and all(map(fits, value, inner))
    if origin is collections.abc.Callable:
        return callable(value)
    if expected is None or expected is type(None):
        return value is None
    if not isinstance(expected, type) or origin is not None:
        return True
    if expected in (int, float) and isinstance(value, bool):
        return False
    try:
        return isinstance(value, expected)
    except TypeError:  # a protocol that cannot be checked
        return True


def type_name(expected: Any) -> str:
    """A type in words, for a message."""
    if get_origin(expected) is Literal:
        return "one of " + ", ".join(map(repr, get_args(expected)))
    names = {type(None): "None"}
    return " or ".join(
        names.get(option) or getattr(option, "__name__", str(option)) for option in alternatives(expected)
    )
