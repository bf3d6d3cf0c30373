"""Ctrl-C and SIGTERM: they end a command, also where a library swallowed the exception that they raise."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Which signal came, if one did."""

    def __init__(self) -> None:
        self.came: int | None = None
        self._held = False

    def __call__(self, number: int, frame: object) -> None:
        again, self.came = self.came is not None, number
        if again or not self._held:
            raise KeyboardInterrupt

    def heed(self) -> None:
        """Raise if a signal came that nobody heard.

        Raises:
            KeyboardInterrupt: One came.
        """
        if self.came is not None:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Only note a first signal within, so that a step can be finished and saved; a second one is not waited for."""
        self._held = True
        try:
            yield
        finally:
            self._held = False


INTERRUPTS = Interrupts()
"""Those of this process; signals have no other scope."""


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Handle the signals within, in the main thread; elsewhere Python lets nobody."""
    INTERRUPTS.came = None
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, INTERRUPTS) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
