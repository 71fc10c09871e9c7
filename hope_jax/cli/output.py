"""What a command owes its surroundings: any encoding of the terminal, signals while it prepares, a closed output."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP outside of the training loop: everything that is unfinished is cleaned up, as after Ctrl-C."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP raise ``Terminated`` in here, unless they are ignored (as ``nohup`` does)."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.signal(number, _terminate) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_anything() -> None:
    """Characters that a terminal cannot show become "?", instead of an error in the middle of a text."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def say(text: str, stream: Any = None) -> None:
    """Print what a finished piece of work has to tell. Nobody who listens any more is no mistake then."""
    stream = sys.stdout if stream is None else stream
    try:
        print(text, file=stream, flush=True)
    except OSError:
        silence(stream)


def silence(stream: Any) -> None:
    """Send what is still to be written to nowhere, so that the end of the process does not fail on it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
