"""What the settings of several experiments must satisfy, said alike."""

from collections.abc import Iterable
from typing import Any

from hope_jax.errors import UserError, closest


def at_least_one(config: Any, *names: str) -> None:
    """Raise UserError for the first of the fields that is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}.")


def known(what: str, name: str, names: Iterable[str]) -> None:
    """Raise UserError unless ``name`` is one of ``names``; ``what`` they are names of."""
    if name not in (names := list(names)):
        raise UserError(f"No {what} is called {name!r}; {closest(name, names)}")
