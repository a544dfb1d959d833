"""Ctrl-C waits for the end of what must not be left half-done."""

import signal
import threading

import pytest

from cleanrl.utils.interrupts import uninterrupted


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def same_handler():
    """Every test leaves the handler it found; here, the usual one that raises KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_without_ctrl_c_nothing_happens():
    done = []
    with uninterrupted():
        done.append(1)
    assert done


@pytest.mark.parametrize("times", [1, 3])
def test_ctrl_c_takes_effect_behind_the_block(times):
    done = []

    def work() -> None:
        with uninterrupted():
            for _ in range(times):
                press_ctrl_c()
            done.append("block")
        done.append("behind")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["block"]


def test_ctrl_c_behind_the_block_is_as_ever():
    with uninterrupted():
        pass
    with pytest.raises(KeyboardInterrupt):
        press_ctrl_c()


def test_the_outermost_block_ends_first():
    done = []

    def work() -> None:
        with uninterrupted():
            with uninterrupted():
                press_ctrl_c()
                done.append("inner")
            done.append("outer")
        done.append("behind")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["inner", "outer"]


def test_an_error_in_the_block_is_raised_and_the_handler_restored():
    with pytest.raises(ValueError, match="wrong"), uninterrupted():
        raise ValueError("wrong")
    with pytest.raises(KeyboardInterrupt):
        press_ctrl_c()


def test_an_error_in_the_block_goes_before_ctrl_c():
    def work() -> None:
        with uninterrupted():
            press_ctrl_c()
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        work()


def test_a_handler_of_the_callers_own_is_called_with_what_arrived():
    arrived = []
    before = signal.signal(signal.SIGINT, lambda number, frame: arrived.append((number, frame)))
    with uninterrupted():
        press_ctrl_c()
        assert arrived == []
    signal.signal(signal.SIGINT, before)
    ((number, frame),) = arrived
    assert number == signal.SIGINT
    assert frame is not None


@pytest.mark.parametrize("ignored", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_ctrl_c_that_nobody_listens_to_stays_without_effect(ignored):
    before = signal.signal(signal.SIGINT, ignored)
    with uninterrupted():
        if ignored is signal.SIG_IGN:
            press_ctrl_c()
    assert signal.signal(signal.SIGINT, before) is ignored


def test_it_may_be_used_in_a_thread():
    done = []

    def work() -> None:
        with uninterrupted():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
