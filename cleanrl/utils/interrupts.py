"""Keeps Ctrl-C away from what must not be left half-done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A Ctrl-C (SIGINT) that arrives in the block takes effect behind it, as KeyboardInterrupt usually."""
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield
        return
    arrived = []
    handler = signal.signal(signal.SIGINT, lambda *signal_and_frame: arrived.append(signal_and_frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if arrived and callable(handler):
        handler(*arrived[0])
