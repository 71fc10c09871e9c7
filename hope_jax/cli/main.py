"""Programs with named parts: find the one that is asked for, run it, turn a user's mistake into one sentence.

Exit status: 0 done; 2 a mistake of the caller (one sentence on stderr); 130 and 143 stopped by Ctrl-C or SIGTERM; 141
the reader of the output went away.
"""

import ast
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence

from hope_jax.cli import COMMANDS


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
    # Here and not above, so that the list appears at once.
    from hope_jax.errors import UserError, closest, extra

    name, *rest = arguments
    try:
        if name not in table:
            raise UserError(f"There is no {kind} {name!r}; {closest(name, table)}")
        module, function = table[name].split(":")
        with extra(needs):
            command = getattr(importlib.import_module(module), function)
        status = command(rest) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    except BrokenPipeError:  # who read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a full or vanished disk, wherever it is noticed
        where = f" {error.filename}" if error.filename else ""
        print(f"Cannot read or write{where}: {error.strerror or error}; mend that and run it again.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped at once; what was saved before is intact.", file=sys.stderr)
        return 130


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
