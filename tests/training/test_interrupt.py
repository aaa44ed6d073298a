"""Ctrl-C as a request."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from gatedprune.training import stop_on_signal


def test_ctrl_c_asks_once_and_interrupts_the_second_time() -> None:
    # A shell starts what runs in the background with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stop_on_signal() as stop:
            assert not stop()
            os.kill(os.getpid(), signal.SIGINT)
            assert stop()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                threading.Event().wait(5)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_are_left_alone() -> None:
    """Python allows handlers in the main thread only."""
    before, asked = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with stop_on_signal() as stop:
            asked.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [False] and signal.getsignal(signal.SIGINT) is before
