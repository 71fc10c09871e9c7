"""Commands run one after another in limited time: one that fails or takes too long does not stop the next one."""

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
    """Run the commands within so many seconds in all; yields name and reason of each that fails, when it ends.

    A command may take one and a half times its share of the time that is left. Where that is less than ``least``
    seconds, it is left out. Shares are proportional to ``weights``, 1 where there is none.
    """
    end, weight = time.monotonic() + seconds, dict.fromkeys(commands, 1.0) | dict(weights or {})
    names = list(commands)
    for done, (name, command) in enumerate(commands.items()):
        left = end - time.monotonic()
        share = min(left, 1.5 * left * weight[name] / sum(weight[other] for other in names[done:]))
        if reason := _run(command, share) if share >= least else "left out: no time was left":
            yield name, reason


def _run(command: Sequence[str], seconds: float) -> str:
    """Why a command failed; empty if it did not. The processes that it started are ended with it."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stderr=pipe, text=True, errors="replace", start_new_session=True) as process:
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} seconds"
        finally:
            with contextlib.suppress(ProcessLookupError):  # all have ended already
                os.killpg(process.pid, signal.SIGKILL)
    return f"exit status {process.returncode}: {_reason(said)[:300]}" if process.returncode else ""


def _reason(said: str) -> str:
    """The last line that names an error, else the last one."""
    lines = said.strip().splitlines() or [""]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1])
