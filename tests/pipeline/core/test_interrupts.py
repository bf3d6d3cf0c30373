"""Signals end a command, also where something swallowed what they raised."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from maskplan.pipeline.core.interrupts import INTERRUPTS, listening


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_raises_and_is_remembered(number: int) -> None:
    with listening():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert INTERRUPTS.came == number
        with pytest.raises(KeyboardInterrupt):
            INTERRUPTS.heed()


def test_nothing_is_heeded_where_nothing_came() -> None:
    with listening():
        INTERRUPTS.heed()
    assert INTERRUPTS.came is None


def test_a_held_signal_waits_and_a_second_does_not() -> None:
    with listening():
        with INTERRUPTS.held():
            os.kill(os.getpid(), signal.SIGTERM)
            assert INTERRUPTS.came == signal.SIGTERM
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            INTERRUPTS.heed()


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with listening():
        assert signal.getsignal(signal.SIGINT) is INTERRUPTS
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_another_thread_listens_to_nothing_and_does_not_fail() -> None:
    errors = []

    def work() -> None:
        try:
            with listening():
                pass
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
