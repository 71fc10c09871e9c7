"""Ctrl-C, SIGTERM and SIGHUP as a request instead of an exception: finish the step, save, then leave.

Read ``loop.py`` next.
"""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STDERR = 2


class Interrupt:
    """While entered, the first of ``SIGNALS`` sets ``signal``; a second SIGINT stops at once (KeyboardInterrupt).

    A signal that is ignored (as ``nohup`` does) stays ignored. Only the main thread can be told: in any other thread
    nothing is changed. On leaving, the handlers that were there before are back.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether somebody asked to stop."""
        return self.signal is not None

    def request(self, number: signal.Signals) -> None:
        """Ask to stop, as that signal does."""
        self.signal = self.signal or number

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.request(signal.Signals(number))
        # Straight to the descriptor: the handler may run in the middle of a write to sys.stderr. After SIGHUP the
        # terminal is gone.
        with contextlib.suppress(OSError):
            os.write(STDERR, b"\nStopping after this step; Ctrl-C again stops at once, without saving.\n")
