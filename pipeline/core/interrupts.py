"""Ctrl-C and SIGTERM end a command, even where a library swallows the exception that they raise."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """The signal handler of this process; `pending` is the last signal's number, or None."""

    def __init__(self) -> None:
        self.pending: int | None = None
        self._deferred = False

    def __call__(self, number: int, frame: object) -> None:
        repeated, self.pending = self.pending is not None, number
        if repeated or not self._deferred:
            raise KeyboardInterrupt

    def raise_pending(self) -> None:
        """Raise if a signal has arrived, which a library may have swallowed.

        Raises:
            KeyboardInterrupt: A signal has arrived.
        """
        if self.pending is not None:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record a first signal inside the block, so that a step can finish and be saved; a second one raises."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False


INTERRUPTS = Interrupts()
"""The one of this process; signal handlers have no narrower scope."""


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    """Handle SIGINT and SIGTERM inside the block; does nothing outside the main thread, where Python sets no handlers."""
    INTERRUPTS.pending = None
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, INTERRUPTS) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
