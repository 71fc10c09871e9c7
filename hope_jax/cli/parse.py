"""Flags from dataclasses: every field is a flag, its default and docstring (or comment) are the help.

A field with a table of ``rows`` in its metadata, such as the optimizer's ``method``, is chosen by name:
``--optimizer.method m3``. The settings of the chosen row are flags beside it: ``--optimizer.slow-period 50``.
What cannot be read becomes one sentence. Read ``main.py`` next.
"""

import contextlib
import inspect
import io
import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_origin

import tyro

from hope_jax.errors import UserError, closest

Config = TypeVar("Config")

PLAIN = {
    r"invalid literal for int\(\) with base 10: (.*)": r"\1 is no whole number",
    r"could not convert string to float: (.*)": r"\1 is no number",
    r"no type matching (\S+) could be instantiated from \['(.*)'\]": r"'\2' is none of \1",
    r"^Missing from[^:]*: [A-Z]+ (.*?)\.? \(required\)$": r"An argument is missing: \1",
}
"""A message of Python or tyro -> the same in plain words."""


def parse(config: type[Config], arguments: Sequence[str], prog: str) -> Config:
    """The command line of the program ``prog`` as a ``config``; ``--help`` ends the program here.

    Raises UserError where a flag is unknown or missing, or its value cannot be read or was refused by its dataclass.
    """
    chosen, arguments = _choose_rows(config, arguments)
    settings = {"args": arguments, "prog": prog} | ({"default": _with_rows(config, chosen)} if chosen else {})
    if {"-h", "--help"} & set(arguments):
        return tyro.cli(config, description=_description(config), **settings)
    _check_flags(config, chosen, arguments, prog)
    said = io.StringIO()
    try:  # silently: tyro prints its message in a box; ours is the sentence alone
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(config, **settings)
    except SystemExit as exit_:
        cause: BaseException | None = exit_
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            cause = cause.__context__
    raise UserError(f"{_sentence(said.getvalue())}; see {prog} --help.")


def with_file(arguments: Sequence[str], flag: str) -> list[str]:
    """The flags of the TOML file that ``flag`` names, then ``arguments``, which replace flags of the file.

    A table is a group of flags: ``[optimizer]`` with ``warmup = 100`` is ``--optimizer.warmup 100``. Raises UserError
    where the file is missing or is no TOML.
    """
    given = [argument.partition("=") for argument in arguments]
    following = [*arguments[1:], ""]
    files = [value or following[at] for at, (name, _, value) in enumerate(given) if name == flag]
    if not files:
        return list(arguments)
    try:
        with Path(files[-1]).expanduser().open("rb") as file:
            settings = tomllib.load(file)
    except OSError as error:
        raise UserError(f"{flag} {files[-1]!r} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UserError(f"{flag} {files[-1]!r} is no TOML: {error}.") from error
    names = {name.replace("_", "-") for name, _, _ in given}
    words = (words for words in _words(settings, "--") if words[0] not in names)
    return [*itertools.chain.from_iterable(words), *arguments]


def _words(settings: Mapping[str, Any], prefix: str) -> Iterator[list[str]]:
    """Each flag of a file with its values."""
    for name, value in settings.items():
        flag = prefix + name.replace("_", "-")
        if isinstance(value, dict):
            yield from _words(value, f"{flag}.")
        elif isinstance(value, bool):
            yield [flag if value else f"{prefix}no-{flag.removeprefix(prefix)}"]
        else:
            yield [flag, *map(str, value if isinstance(value, list) else [value])]


def _fields(config: Any, chosen: Mapping[str, Any] = {}, prefix: str = "--") -> Iterator[tuple[str, Field]]:
    """The fields of a dataclass and of those inside it, by flag; the settings of a row are flags beside its own."""
    for field in fields(config):
        flag = prefix + field.name.replace("_", "-")
        if "rows" in field.metadata:
            yield flag, field
            yield from _fields(chosen.get(flag, field.default), chosen, prefix)
        elif is_dataclass(field.type):
            yield from _fields(field.type, chosen, f"{flag}.")
        elif get_origin(field.type) is not Annotated:  # a positional argument has no flag
            yield flag, field


def _flags(config: Any, chosen: Mapping[str, Any] = {}, prefix: str = "--") -> Iterator[tuple[str, bool]]:
    """Every flag, as tyro spells it, and whether it must be given."""
    for flag, field in _fields(config, chosen, prefix):
        yield flag, field.default is field.default_factory is MISSING
        if field.type is bool:
            yield re.sub(r"(\w[\w-]*)$", r"no-\1", flag), False


def _tables(config: Any) -> dict[str, Mapping[str, Any]]:
    """The tables of rows by the flags that name a row."""
    return {flag: field.metadata["rows"] for flag, field in _fields(config) if "rows" in field.metadata}


def _description(config: type) -> str:
    """The docstring of ``config``, and which rows there are to choose from."""
    choices = [
        f"{flag} NAME takes a row of the table {', '.join(rows)}; its settings are then flags, too."
        for flag, rows in _tables(config).items()
    ]
    return "\n\n".join([inspect.getdoc(config) or "", *choices])


def _choose_rows(config: Any, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The rows that ``arguments`` name, by flag, and the arguments without those flags."""
    tables, chosen, rest = _tables(config), {}, []
    words = iter(arguments)
    for word in words:
        flag, equals, name = word.partition("=")
        if flag not in tables:
            rest.append(word)
            continue
        name = name if equals else next(words, "")
        if name not in tables[flag]:
            raise UserError(f"{flag} is {name!r}; {closest(name, tables[flag])}")
        chosen[flag] = tables[flag][name]
    return chosen, rest


def _with_rows(config: Any, chosen: Mapping[str, Any], prefix: str = "--") -> Any:
    """The defaults of ``config`` with the ``chosen`` rows; ``tyro.MISSING`` for a field without a default."""
    default = object.__new__(config if isinstance(config, type) else type(config))
    for field in fields(config):
        flag = prefix + field.name.replace("_", "-")
        value = _default(field) if isinstance(config, type) else getattr(config, field.name)
        if is_dataclass(field.type):
            value = _with_rows(field.type if value is tyro.MISSING else value, chosen, f"{flag}.")
        object.__setattr__(default, field.name, chosen.get(flag, value))
    return default


def _default(field: Field) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return tyro.MISSING if field.default is MISSING else field.default


def _check_flags(config: Any, chosen: Mapping[str, Any], arguments: Sequence[str], prog: str) -> None:
    flags = dict(_flags(config, chosen))
    given = [argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")]
    for flag in given:
        if flag not in flags:
            _check_row(config, flag)
            raise UserError(f"There is no flag {flag}; {closest(flag, flags)}")
    for flag, required in flags.items():
        if required and flag not in given:
            raise UserError(f"The flag {flag} is missing: it has no default; see {prog} --help.")


def _check_row(config: Any, flag: str) -> None:
    """Raise UserError for a flag that is a setting of another row than the chosen one."""
    for chooser, rows in _tables(config).items():
        prefix = chooser[: chooser.rindex(".") + 1] if "." in chooser else "--"
        owners = [name for name, row in rows.items() if flag in dict(_flags(row, prefix=prefix))]
        if owners:
            raise UserError(f"The flag {flag} belongs to {chooser} {' or '.join(owners)}; add that, or leave it out.")


def _sentence(box: str) -> str:
    """The message in tyro's box: its first paragraph, and how the flag is spelled where the second one says so."""
    rows = ["" if line.startswith(("╭", "╰")) else line.strip("│ ") for line in box.splitlines()]
    parts = [list(part) for text, part in itertools.groupby(rows, lambda row: bool(row.strip("─-"))) if text]
    if not box.startswith("╭"):  # a terminal without such characters: the first part is the title
        parts = parts[1:]
    reason, *usage = parts or [["The flags cannot be read"]]
    sentence = re.sub(r"\. (\w)", lambda match: f"; {match[1].lower()}", " ".join(reason).rstrip("."))
    for said, plain in PLAIN.items():
        sentence = re.sub(said, plain, sentence)
    spelled = [part[1] for part in usage if part[0] == "Argument helptext:"]
    return "; expected ".join([sentence, *spelled])
