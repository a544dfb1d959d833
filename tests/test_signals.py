"""The first signal is noted, a second may end the process, and afterwards the handlers are as before."""

import signal
import threading
from pathlib import Path

import pytest
from both_scripts import run_python

from cleanrl.utils.signals import Stopped, StopSignals, name_of

STOP = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
SIGNALS = pytest.mark.parametrize("number", STOP)


@pytest.fixture(autouse=True)
def same_handlers():
    before = {number: signal.getsignal(number) for number in STOP}
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


def raise_two(first: signal.Signals, second: signal.Signals) -> tuple[int, str, str]:
    program = f"""
import signal
from cleanrl.utils.signals import StopSignals
with StopSignals() as signals:
    signal.raise_signal({int(first)})
    print("first", flush=True)
    signal.raise_signal({int(second)})
    print(signals.received, flush=True)
"""
    return run_python(Path(), "-c", program)


@pytest.mark.parametrize("first", STOP)
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_to_end_is_obeyed_at_once(first, second):
    assert raise_two(first, second) == (128 + second, "first\n", "")


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGHUP, signal.SIGHUP), (signal.SIGTERM, signal.SIGHUP), (signal.SIGUSR1, signal.SIGUSR1)],
)
def test_a_warning_that_comes_again_does_not_cost_the_checkpoint(first, second):
    """A shell may pass on the SIGHUP that the process gets anyway."""
    assert raise_two(first, second) == (0, f"first\n{int(first)}\n", "")


def test_under_nohup_a_closed_terminal_is_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGHUP)
        assert signals.received is None
    signal.signal(signal.SIGHUP, before)


def test_signals_without_a_name_have_a_number():
    assert name_of(signal.SIGTERM) == "SIGTERM"
    assert name_of(40) == "signal 40"
    assert str(Stopped(40)) == "stopped by signal 40"
