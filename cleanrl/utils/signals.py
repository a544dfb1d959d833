"""SIGINT (Ctrl-C) and SIGTERM: a run stops where nothing is half-done, with the signal's exit status."""

import os
import signal
import sys
import threading
from types import FrameType


class Stopped(Exception):
    """The run was asked to stop; `status` is the exit status, 128 plus the signal's number."""

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.status = 128 + signal_number


def exit_on_ctrl_c() -> None:
    """From now on Ctrl-C ends the process with a line, not a traceback; for while nothing can be lost."""

    def handle(number: int, frame: FrameType | None) -> None:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGINT, handle)


class StopSignals:
    """A context in which the first signal is only noted, and a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():  # where signals arrive
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
