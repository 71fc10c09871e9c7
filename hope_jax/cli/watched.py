"""Commands one after another within a time: what fails, or takes too long, is told and does not stop the next one."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence


def failures(
    commands: Mapping[str, Sequence[str]],
    seconds: float,
    weights: Mapping[str, float] | None = None,
    least: float = 15.0,
) -> Iterator[tuple[str, str]]:
    """Run the commands within so many seconds in all; name and reason of each that did not end well, as it ends.

    A command may take one and a half times its share of the time that is left, and is left out where that is less than
    ``least``. Shares are equal, or as large as ``weights``, 1 for the others.
    """
    end, weight = time.monotonic() + seconds, dict.fromkeys(commands, 1.0) | dict(weights or {})
    names = list(commands)
    for done, (name, command) in enumerate(commands.items()):
        left = end - time.monotonic()
        share = min(left, 1.5 * left * weight[name] / sum(weight[other] for other in names[done:]))
        if reason := _run(command, share) if share >= least else "left out: no time was left":
            yield name, reason


def _run(command: Sequence[str], seconds: float) -> str:
    """Why a command did not end well; empty if it did. What it started ends with it."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stderr=pipe, text=True, errors="replace", start_new_session=True) as process:
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} seconds"
        finally:
            with contextlib.suppress(ProcessLookupError):  # all have ended
                os.killpg(process.pid, signal.SIGKILL)
    return f"exit status {process.returncode}: {_reason(said)[:300]}" if process.returncode else ""


def _reason(said: str) -> str:
    """The last line that names an error, else the last one."""
    lines = said.strip().splitlines() or [""]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1])
