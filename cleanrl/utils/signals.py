"""Signals that stop a run where nothing is half-done, with the signal's exit status."""

import os
import signal
import threading
from types import FrameType

# Ctrl-C; a request to end; a closed terminal or ssh connection; what Slurm sends before its time limit.
STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)  # Windows has only two of them
)


def name_of(signal_number: int) -> str:
    try:
        return signal.Signals(signal_number).name
    except ValueError:  # one of the real-time signals
        return f"signal {signal_number}"


class Stopped(Exception):
    """The run was asked to stop; `status` is the exit status, 128 plus the signal's number."""

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by {name_of(signal_number)}")
        self.status = 128 + signal_number


class StopSignals:
    """A context in which the first of `STOP_SIGNALS` is only noted, and a further SIGINT or SIGTERM ends the
    process at once. SIGHUP stays ignored in a process that was started with `nohup`.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():  # where signals arrive
            for number in STOP_SIGNALS:
                is_ignored = signal.getsignal(number) == signal.SIG_IGN
                if number in (signal.SIGINT, signal.SIGTERM) or not is_ignored:
                    self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
        elif number in (signal.SIGINT, signal.SIGTERM):
            os._exit(128 + number)
