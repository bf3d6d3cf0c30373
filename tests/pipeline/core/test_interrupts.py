"""Signals end a command, also where something swallowed what they raised."""

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


def test_nothing_is_heeded_where_nothing_came() -> None:
    with handle_signals():
        INTERRUPTS.raise_pending()
    assert INTERRUPTS.pending is None


def test_a_held_signal_waits_and_a_second_does_not() -> None:
    with handle_signals():
        with INTERRUPTS.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert INTERRUPTS.pending == signal.SIGTERM
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            INTERRUPTS.raise_pending()


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with handle_signals():
        assert signal.getsignal(signal.SIGINT) is INTERRUPTS
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_another_thread_listens_to_nothing_and_does_not_fail() -> None:
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
