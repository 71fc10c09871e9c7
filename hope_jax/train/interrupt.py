"""Ctrl-C and SIGTERM as a request instead of an exception: finish the step, save, then leave. Read ``loop.py`` next."""

import os
import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STDERR = 2


class Interrupt:
    """While entered, the first SIGINT or SIGTERM sets ``signal``; a second SIGINT stops at once (KeyboardInterrupt).

    Enter it in the main thread only; on leaving, the handlers that were there before are back.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether somebody asked to stop."""
        return self.signal is not None

    def __enter__(self) -> "Interrupt":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        # Straight to the descriptor: the handler may run in the middle of a write to sys.stderr.
        os.write(STDERR, b"\nStopping after this step; Ctrl-C again stops at once, without saving.\n")
