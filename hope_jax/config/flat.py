"""Two configurations side by side: dotted names of everything nested, and what differs."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hope_jax.config.encode import Json, encode
from hope_jax.config.names import join
from hope_jax.errors import UserError


def flatten(config: Any) -> dict[str, Any]:
    """Dotted field name -> number, text or list, through everything nested.

    The class of a nested dataclass counts too: it is the entry of the field's own name. ``config``: a dataclass or a
    mapping.
    """
    return flatten_json(encode(config, ""))


def flatten_json(data: Json) -> dict[str, Any]:
    """``flatten`` of a configuration that is JSON already: also of one that this version cannot read any more."""
    flat = dict(_flat(data, ""))
    flat.pop("", None)
    return flat


def _flat(data: Json, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(data, list) and any(isinstance(item, dict) for item in data):
        for i, item in enumerate(data):
            yield from _flat(item, join(name, i))
    elif not isinstance(data, dict):
        yield name, data
    elif data.keys() == {"mapping"}:
        yield from _flat_items(data["mapping"], name)
    elif len(data) == 1 and "class" not in data:  # a function, dtype, path or float by its name alone
        yield name, next(iter(data.values()))
    else:
        if "class" in data:
            yield name, data["class"]
        yield from _flat_items({key: item for key, item in data.items() if key != "class"}, name)


def _flat_items(items: Mapping[str, Json], name: str) -> Iterator[tuple[str, Any]]:
    for key, item in items.items():
        yield from _flat(item, join(name, key))


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to continue a run with another configuration; both as ``flatten`` gives them.

    Raises:
        UserError: naming every field that differs, with both values.
    """
    absent = "absent"
    names = sorted(saved.keys() | now.keys())
    pairs = [(name, saved.get(name, absent), now.get(name, absent)) for name in names]
    differing = [f"{name} is {old} there and {new} here" for name, old, new in pairs if old != new]
    if differing:
        raise UserError(
            f"The run folder {folder} belongs to another configuration: {'; '.join(differing)}. Use the same values to "
            "continue it or another --run to start anew."
        )
