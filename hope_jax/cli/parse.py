"""Flags from dataclasses: every field is a flag, its default and docstring are the help.

What cannot be read becomes one sentence. Read ``main.py`` next.
"""

import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar, get_origin

import tyro

from hope_jax.errors import UserError, closest

Config = TypeVar("Config")


def parse(config: type[Config], arguments: Sequence[str], prog: str) -> Config:
    """The command line of the program ``prog`` as a ``config``; ``--help`` ends the program here.

    Raises:
        UserError: a flag is unknown or missing, or its value cannot be read or was refused by its dataclass.
    """
    if {"-h", "--help"} & set(arguments):
        return tyro.cli(config, args=arguments, prog=prog)
    _check_flags(config, arguments, prog)
    said = io.StringIO()
    try:  # silently: tyro frames what it refuses in a box; we want the sentence itself
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(config, args=arguments, prog=prog)
    except SystemExit as exit_:
        cause: BaseException | None = exit_
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            cause = cause.__context__
    raise UserError(f"{_sentence(said.getvalue())}; see {prog} --help.")


def _check_flags(config: Any, arguments: Sequence[str], prog: str) -> None:
    flags = dict(_flags(config))
    given = [argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")]
    for flag in given:
        if flag not in flags:
            raise UserError(f"There is no flag {flag}; {closest(flag, flags)}")
    for flag, required in flags.items():
        if required and flag not in given:
            raise UserError(f"The flag {flag} is missing: it has no default; see {prog} --help.")


def _flags(config: Any, prefix: str = "--") -> Iterator[tuple[str, bool]]:
    """Every flag of a dataclass and of those inside it, as tyro spells them, and whether it must be given."""
    for field in dataclasses.fields(config):
        if get_origin(field.type) is Annotated:  # a positional argument has no flag
            continue
        flag = field.name.replace("_", "-")
        if dataclasses.is_dataclass(field.type):
            yield from _flags(field.type, f"{prefix}{flag}.")
            continue
        yield f"{prefix}{flag}", field.default is field.default_factory is dataclasses.MISSING
        if field.type is bool:
            yield f"{prefix}no-{flag}", False


def _sentence(box: str) -> str:
    """What tyro says in a box: its first paragraph, and how the flag is spelled where the second one tells."""
    rows = ["" if line.startswith(("╭", "╰")) else line.strip("│ ") for line in box.splitlines()]
    parts = [list(part) for text, part in itertools.groupby(rows, lambda row: bool(row.strip("─-"))) if text]
    if not box.startswith("╭"):  # a terminal without such characters: the first part is the title
        parts = parts[1:]
    reason, *usage = parts or [["The flags cannot be read"]]
    sentence = re.sub(r"\. (\w)", lambda match: f"; {match[1].lower()}", " ".join(reason).rstrip("."))
    spelled = [part[1] for part in usage if part[0] == "Argument helptext:"]
    return "; expected ".join([sentence, *spelled])
