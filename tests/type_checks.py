"""Types and shapes in signatures are checked in every test, for a third of what jaxtyping's decorator costs.

jaxtyping's import hook decorates all functions and dataclasses of the package. Its own decorator checks the arguments a
second time with the result, wraps functions that have nothing to check, and writes the check of a function inside a
function anew whenever the outer one is called, which tracing does thousands of times. Here a check is written once,
when it is first needed, and runs once. Sizes from values of arguments ("{n}") are not supported.
"""

import dataclasses
import functools
import inspect
import threading
from typing import Any

import jaxtyping

CHECKS: dict[Any, Any] = {}
"""Code and annotations of a function -> its check: functions inside functions share it."""


class Running(threading.local):
    """The functions that run, the last one innermost."""

    def __init__(self) -> None:
        self.targets: list[Any] = []


RUNNING = Running()


def checked(typechecker: Any, target: Any) -> Any:
    """The function, or the dataclass with its ``__init__``, with its types checked."""
    if inspect.isclass(target):
        if dataclasses.is_dataclass(target) and "__init__" in vars(target):
            target.__init__ = checked(typechecker, target.__init__)
        return target
    if not target.__annotations__:
        return target
    key = target.__code__, *map(str, target.__annotations__.values())

    @functools.wraps(target)
    def call(*arguments, **named):
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return target(*arguments, **named)
        check = CHECKS.get(key) or written(typechecker, target, key)
        RUNNING.targets.append(target)
        try:
            with ORIGINAL("context"):  # in which a letter is one size
                return check(*arguments, **named)
        finally:
            RUNNING.targets.pop()

    return call


def written(typechecker, target, key):
    """The check of such functions: of the arguments, then, of the function that runs, the call and its result."""

    @functools.wraps(target)
    def innermost(*arguments, **named):
        return RUNNING.targets[-1](*arguments, **named)

    return CHECKS.setdefault(key, typechecker(innermost))


def jaxtyped(fn: Any = None, *, typechecker: Any = None) -> Any:
    """As jaxtyping's own, in the place of which it is put here."""
    return ORIGINAL(fn) if fn == "context" else functools.partial(checked, typechecker)


ORIGINAL = jaxtyping.jaxtyped
jaxtyping.jaxtyped = jaxtyped
