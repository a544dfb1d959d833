"""The first signal is noted, the second ends the process, and afterwards the handlers are as before."""

import signal
import threading
from pathlib import Path

import pytest
from both_scripts import run_python

from cleanrl.utils.signals import Stopped, StopSignals

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
    assert str(Stopped(number)) == f"stopped by {number.name}"


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


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_process_at_once(first, second):
    program = f"""
import signal
from cleanrl.utils.signals import StopSignals
with StopSignals():
    signal.raise_signal({int(first)})
    print("first", flush=True)
    try:
        signal.raise_signal({int(second)})
    finally:
        print("second", flush=True)
"""
    assert run_python(Path(), "-c", program) == (128 + second, "first\n", "")


def test_before_there_is_anything_to_lose_ctrl_c_is_one_line():
    program = """
import signal
from cleanrl.utils.signals import exit_on_ctrl_c
exit_on_ctrl_c()
signal.raise_signal(signal.SIGINT)
"""
    assert run_python(Path(), "-c", program) == (130, "", "interrupted\n")
