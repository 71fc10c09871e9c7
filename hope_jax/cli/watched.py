"""Commands one after another within a time: what fails, or takes too long, is told and does not stop the next one."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence


def failures(commands: Mapping[str, Sequence[str]], seconds: float, least: float = 15.0) -> Iterator[tuple[str, str]]:
    """Run the commands within so many seconds in all; name and reason of each that did not end well, as it ends.

    A command may take one and a half times its equal share of the time that is left, and is left out where that is less
    than ``least``.
    """
    end = time.monotonic() + seconds
    for done, (name, command) in enumerate(commands.items()):
        left = end - time.monotonic()
        share = min(left, 1.5 * left / (len(commands) - done))
        if reason := _run(command, share) if share >= least else "left out: no time was left":
            yield name, reason


def _run(command: Sequence[str], seconds: float) -> str:
    """Why a command did not end well; empty if it did. What it started ends with it."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True)
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} seconds"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if not process.returncode:
        return ""
    lines = said.strip().splitlines() or [""]
    return f"exit status {process.returncode}: {lines[-1][:300]}"
