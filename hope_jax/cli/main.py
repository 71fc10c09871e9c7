"""Programs with named parts: find the part that is asked for, run it, turn a user's mistake into one sentence.

A program copes with any encoding of the terminal, with signals while it prepares, and with an output that is closed.

Exit status: 0 done; 2 a mistake of the caller (one sentence on stderr); 128 + the number of the signal that stopped it:
130 Ctrl-C, 143 SIGTERM, 129 SIGHUP, 141 the reader of the output went away.
"""

import ast
import atexit
import contextlib
import gc
import importlib
import importlib.util
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from hope_jax.cli import COMMANDS
from hope_jax.errors import Stopped, UserError, closest, exit_status, extra, of_disk
from hope_jax.signals import handled


def main(arguments: Sequence[str] | None = None) -> int:
    """``hope-jax NAME [FLAGS]``, or ``python -m hope_jax``; None: the flags of this process."""
    return run("hope_jax", "command", COMMANDS, "train", sys.argv[1:] if arguments is None else arguments)


def run(program: str, kind: str, table: Mapping[str, str], needs: str, arguments: Sequence[str]) -> int:
    """Run the row of ``table`` that ``arguments`` name; returns the exit status.

    Args:
      program: what follows ``python -m``.
      kind: what a row is called.
      needs: the extra of hope_jax whose packages the rows import.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_listing(program, table), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # "?" for what a terminal cannot show, instead of an error
    name, *rest = arguments
    atexit.register(gc.freeze)  # else Python searches all that was imported for garbage before it ends
    with handled((signal.SIGTERM, signal.SIGHUP), _terminate):  # outside of training they act as Ctrl-C
        return _status(lambda: _start(kind, table, needs, name, rest), [program, name, *rest])


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _start(kind: str, table: Mapping[str, str], needs: str, name: str, rest: Sequence[str]) -> int:
    if name not in table:
        raise UserError(f"There is no {kind} {name!r}; {closest(name, table)}")
    module, function = table[name].split(":")
    with extra(needs):
        command = getattr(importlib.import_module(module), function)
    return command(rest) or 0


def _status(work: Callable[[], int], command: Sequence[str]) -> int:
    """The exit status of ``work``, which ``command`` asked for. Errors that are no mistake of ours become a status."""
    try:
        status = work()
        sys.stdout.flush()
        return status
    except UserError as error:
        say(" ".join(str(error).split()), sys.stderr)
        return exit_status(error)
    except Stopped as stopped:
        again = shlex.join([sys.executable, "-m", *without(command, "--resume-from")])
        say(f"{stopped} To go on:\n  {again}")
        return 128 + stopped.signal
    except BrokenPipeError as error:  # the reader of the output has closed it
        silence(sys.stdout)
        return exit_status(error)
    except OSError as error:
        say(str(of_disk(error)), sys.stderr)
        return exit_status(error)
    except KeyboardInterrupt as interrupt:
        say("Stopped at once; what was saved before is intact.", sys.stderr)
        return exit_status(interrupt)


def say(text: str, stream: Any = None) -> None:
    """Print a message about finished work. An output that has been closed is no error."""
    stream = sys.stdout if stream is None else stream
    try:
        print(text, file=stream, flush=True)
    except OSError:
        silence(stream)


def silence(stream: Any) -> None:
    """Drop what a stream has not written yet, so that the process does not fail on it when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def without(arguments: Sequence[str], flag: str) -> list[str]:
    """``arguments`` without one flag and its value: a run that goes on must not go back once more."""
    kept, words = [], iter(arguments)
    for word in words:
        name, equals, _ = word.partition("=")
        if name.replace("_", "-") != flag:
            kept.append(word)
        elif not equals:
            next(words, None)
    return kept


def _listing(program: str, table: Mapping[str, str]) -> str:
    rows = [f"  {name:<20} {_headline(target.split(':')[0])}" for name, target in sorted(table.items())]
    return "\n".join([f"usage: python -m {program} NAME [FLAGS]   (NAME --help explains the flags)", "", *rows])


def _headline(module: str) -> str:
    """First line of the module's docstring, read without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    with open(spec.origin, encoding="utf-8") as file:
        return (ast.get_docstring(ast.parse(file.read())) or "").partition("\n")[0]
