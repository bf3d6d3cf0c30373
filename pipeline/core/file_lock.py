"""Exclusive locks on files and folders, between processes."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from typing import IO, Any

from maskplan.pipeline.core.errors import HostError

_POLL_S = 0.1


def acquire_lock(file: int | IO[Any], busy: Callable[[], HostError], *, wait_s: float = 0) -> None:
    """Lock an open file or folder (`flock`) until it is closed; the lock of a killed process ends with the process.

    Args:
        file: A file object, or the descriptor of a file or folder.
        busy: Creates the error for a lock that another process holds.
        wait_s: Seconds to wait for that process; 0 fails immediately.

    Raises:
        HostError: The one of `busy`.
        OSError: The file system has no locks.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            # Polled: flock itself cannot wait with a time limit.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise busy() from error
        time.sleep(_POLL_S)
