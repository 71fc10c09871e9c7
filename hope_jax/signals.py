"""Ctrl-C, SIGTERM and SIGHUP as a request instead of an exception: finish the step, save, then leave."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from signal import SIG_IGN, SIGHUP, SIGINT, SIGTERM, Signals, getsignal, signal
from types import FrameType

STDERR = 2


@contextlib.contextmanager
def handled(numbers: Sequence[Signals], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """In here ``handler`` is told of these signals, except those that are ignored (as ``nohup`` does).

    Only the main thread can be told: in any other thread nothing is changed.
    """
    told = threading.current_thread() is threading.main_thread()
    heard = [number for number in numbers if told and getsignal(number) is not SIG_IGN]
    before = {number: signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, former in before.items():
            signal(number, former)


class Interrupt(contextlib.ExitStack):
    """While entered, the first of these signals sets ``signal``; a second SIGINT stops at once (KeyboardInterrupt)."""

    def __init__(self) -> None:
        super().__init__()
        self.signal: Signals | None = None

    @property
    def requested(self) -> bool:
        """Whether somebody asked to stop."""
        return self.signal is not None

    def request(self, number: Signals) -> None:
        """Ask to stop, as that signal does."""
        self.signal = self.signal or number

    def __enter__(self) -> "Interrupt":
        self.enter_context(handled((SIGINT, SIGTERM, SIGHUP), self._note))
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == SIGINT:
            raise KeyboardInterrupt
        self.request(Signals(number))
        # Straight to the descriptor: the handler may run in the middle of a write to sys.stderr. After SIGHUP the
        # terminal is gone.
        with contextlib.suppress(OSError):
            os.write(STDERR, b"\nStopping after this step; Ctrl-C again stops at once, without saving.\n")
