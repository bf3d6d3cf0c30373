"""Locks between two descriptors, which exclude each other as two processes do."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from maskplan.pipeline.core.errors import HostError
from maskplan.pipeline.core.file_lock import acquire_lock


def busy() -> HostError:
    return HostError("in use")


def test_a_second_lock_fails_until_the_first_file_is_closed(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("a") as second:
        with (tmp_path / "lock").open("a") as first:
            acquire_lock(first, busy)
            with pytest.raises(HostError, match="in use"):
                acquire_lock(second, busy)
        acquire_lock(second, busy)


def test_a_folder_can_be_locked_by_its_descriptor(tmp_path: Path) -> None:
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    try:
        acquire_lock(first, busy)
        with pytest.raises(HostError):
            acquire_lock(second, busy)
    finally:
        os.close(first)
        os.close(second)


def test_a_lock_released_in_time_is_waited_for(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("a") as second:
        first = (tmp_path / "lock").open("a")
        acquire_lock(first, busy)
        timer = threading.Timer(0.2, first.close)
        timer.start()
        started = time.monotonic()
        acquire_lock(second, busy, wait_s=30)
        timer.join()
        assert 0.1 < time.monotonic() - started < 20


def test_waiting_ends_with_the_error_of_the_caller(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("a") as first, (tmp_path / "lock").open("a") as second:
        acquire_lock(first, busy)
        started = time.monotonic()
        with pytest.raises(HostError, match="in use"):
            acquire_lock(second, busy, wait_s=0.25)
        assert time.monotonic() - started >= 0.25


def test_a_file_system_without_locks_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with (tmp_path / "lock").open("a") as file, pytest.raises(OSError, match="lock"):
        acquire_lock(file, busy)
