"""The errors a caller can mend: mistakes of their own, and a package of an extra that is not installed."""

import contextlib
import dataclasses
import difflib
import operator
import signal
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args, get_origin


class UserError(ValueError):
    """What came, what was expected, what to do. The command line prints it as one sentence and exits with 2."""


def of_disk(error: OSError) -> UserError:
    """The mistake that a full or vanished disk is, wherever it is noticed."""
    where = f" {error.filename}" if error.filename else ""
    return UserError(f"Cannot read or write{where}: {error.strerror or error}; mend that and run it again.")


def exit_status(error: BaseException) -> int:
    """Of a program that ends with it: 2 a mistake of the caller, 128 + the number of a signal, 1 a mistake of ours."""
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    if isinstance(error, KeyboardInterrupt):
        return 128 + (*error.args, signal.SIGINT)[0]  # Python's own has no number
    return 2 if isinstance(error, UserError | OSError) else 1


class NotFinite(UserError):
    """A model computes infinite or NaN logits."""


def guess(name: str, names: Iterable[str]) -> str:
    """A hint such as ``did you mean 'hope-tiny'?`` with at most three names; empty when none is close."""
    near = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.5)
    return "did you mean " + " or ".join(repr(n) for n in near) + "?" if near else ""


def closest(name: str, names: Iterable[str]) -> str:
    """The names that are close, as ``guess`` says it, or the list of known names when none is."""
    known = sorted(names)
    return guess(name, known) or "known names: " + ", ".join(known)


class MissingExtra(UserError, ImportError):
    """A package that only an extra of hope_jax installs is missing."""


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of packages that the extra ``name`` of hope_jax installs (``setup.cfg`` lists them).

    Raises:
        MissingExtra: one of them is not installed; the sentence names the package and the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "hope_jax":  # a mistake of ours
            raise
        how = f"it comes with the extra [{name}]: pip install 'hope_jax[{name}]'"
        raise MissingExtra(f"The package {package!r} is not installed; {how}") from error


class Stopped(Exception):
    """Work that was asked to stop has stopped, and what it had done is saved; the message says how far it came.

    ``signal``: number of the signal that asked, such as SIGTERM.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def whole(name: str, value: Any, least: int = 1, what: str = "") -> int:
    """The integer, a number of ``what``. UserError, naming the argument, for others and for numbers below ``least``."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        unit = f" ({what})" if what else ""
        raise UserError(f"{name} is {value!r}; give a whole number of at least {least}{unit}.")
    return number


def check_word(name: str, value: Any, words: Any) -> None:
    """Raise UserError unless ``value`` is one of those of the ``Literal``."""
    if value not in get_args(words):
        raise UserError(f"{name} is {value!r}; expected one of {get_args(words)}")


def check_seed(seed: Any) -> int:
    """The seed. Raises UserError unless it is a whole number of 32 bits: JAX would drop the others."""
    if whole("seed", seed, 0) >= 2**32:
        raise UserError(f"seed is {seed}; give a number below {2**32}.")
    return operator.index(seed)


def check_choices(config: Any) -> None:
    """``check_word`` for every field of a dataclass whose type is a ``Literal``."""
    for field in dataclasses.fields(config):
        if get_origin(field.type) is Literal:
            check_word(field.name, getattr(config, field.name), field.type)
