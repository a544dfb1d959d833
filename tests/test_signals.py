"""Signals: the first is noted, the second ends the process, and before and behind all is as it was."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cleanrl.utils.signals import Stopped, StopSignals

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture(autouse=True)
def same_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    assert before == {number: signal.getsignal(number) for number in before}


@SIGNALS
def test_the_first_signal_is_only_noted(number):
    with StopSignals() as signals:
        assert signals.received is None
        signal.raise_signal(number)
        assert signals.received == number
    assert Stopped(number).status == 128 + number


def test_an_exception_passes_and_the_handlers_are_put_back():
    with pytest.raises(ValueError, match="wrong"), StopSignals():
        raise ValueError("wrong")


def test_another_thread_gets_no_signals_and_no_error():
    received = []

    def work() -> None:
        with StopSignals() as signals:
            received.append(signals.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert received == [None]


def run(program: str) -> tuple[int, str, str]:
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    return process.returncode, process.stdout, process.stderr


@SIGNALS
def test_the_second_signal_ends_the_process_at_once(number):
    status, output, _ = run(
        f"""
import signal
from cleanrl.utils.signals import StopSignals
with StopSignals():
    signal.raise_signal({int(number)})
    print("first", flush=True)
    try:
        signal.raise_signal({int(number)})
    finally:
        print("second", flush=True)
"""
    )
    assert (status, output) == (128 + number, "first\n")


def test_before_there_is_anything_to_lose_ctrl_c_is_one_line():
    status, _, errors = run(
        """
import signal
from cleanrl.utils.signals import exit_on_ctrl_c
exit_on_ctrl_c()
signal.raise_signal(signal.SIGINT)
"""
    )
    assert (status, errors) == (130, "interrupted\n")
