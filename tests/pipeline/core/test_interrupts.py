"""Signals end a command, even where a library swallows the exception that they raise."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from maskplan.pipeline.core.interrupts import INTERRUPTS, handle_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_raises_and_is_remembered(number: int) -> None:
    with handle_signals():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert INTERRUPTS.pending == number
        with pytest.raises(KeyboardInterrupt):
            INTERRUPTS.raise_pending()


def test_without_a_signal_nothing_is_raised() -> None:
    with handle_signals():
        INTERRUPTS.raise_pending()
    assert INTERRUPTS.pending is None


def test_a_first_signal_is_deferred_and_a_second_raises() -> None:
    with handle_signals():
        with INTERRUPTS.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert INTERRUPTS.pending == signal.SIGTERM
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            INTERRUPTS.raise_pending()


def test_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with handle_signals():
        assert signal.getsignal(signal.SIGINT) is INTERRUPTS
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_another_thread_sets_no_handlers_and_does_not_fail() -> None:
    errors = []

    def work() -> None:
        try:
            with handle_signals():
                pass
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
