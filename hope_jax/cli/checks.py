"""Checks of settings that several commands and experiments have."""

from collections.abc import Iterable
from typing import Any

from hope_jax.errors import UserError, check_seed, closest


def at_least(config: Any, least: int, *names: str) -> None:
    """Raise UserError for the first of the fields that is smaller; of a tuple, the least number counts."""
    for name in names:
        value = getattr(config, name)
        if (found := min(value) if isinstance(value, tuple) else value) < least:
            raise UserError(f"{flag(name)} must be at least {least}, got {found}.")


def given(config: Any, *names: str) -> None:
    """Raise UserError unless each of the fields, which are tuples, has something in it."""
    if not all(getattr(config, name) for name in names):
        raise UserError(f"Give at least one of each: {', '.join(map(flag, names))}.")


def check_seeds(config: Any) -> None:
    """Raise UserError for the first of the ``seeds`` that is no seed."""
    given(config, "seeds")
    for seed in config.seeds:
        check_seed(seed)


def flag(name: str) -> str:
    """A field's name as the command line spells it."""
    return f"--{name.replace('_', '-')}"


def must_divide(small: str, value: int, large: str, total: int) -> None:
    """Raise UserError unless field ``small`` is at least 1 and divides field ``large``."""
    if value < 1 or total % value:
        raise UserError(f"{flag(small)} must divide {flag(large)}, got {value} for {total}.")


def known(what: str, name: str, names: Iterable[str]) -> None:
    """Raise UserError unless ``name`` is one of ``names``; ``what`` they are names of."""
    if name not in (names := list(names)):
        raise UserError(f"No {what} is called {name!r}; {closest(name, names)}")
