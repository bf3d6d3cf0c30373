"""The timing cache: what the builder measured, kept between runs and shared between processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskplan.pipeline.core.errors import HostError
from maskplan.pipeline.core.file_lock import acquire_lock
from maskplan.pipeline.core.files import write_atomically

log = logging.getLogger(__name__)


def load_timing_cache(config: Any, path: Path, wait_s: float) -> None:
    """Give a builder configuration what is in the file; a cache of another TensorRT or GPU is started anew.

    Raises:
        HostError: Another process has held the file for longer than `wait_s`.
    """
    with _locked(path, wait_s):
        stored = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(stored) if stored else None
    if cache is None or not config.set_timing_cache(cache, False):
        if stored:
            log.warning("%s: the timing cache is of another TensorRT or GPU; a new one is begun", path)
        fresh = config.create_timing_cache(b"")
        if fresh is None or not config.set_timing_cache(fresh, False):
            log.warning("TensorRT makes no timing cache; the build is not kept for the next")


def save_timing_cache(config: Any, path: Path, wait_s: float) -> None:
    """Add what this build measured to the file, with what others added meanwhile; a busy file is left alone."""
    mine = config.get_timing_cache()
    if mine is None:
        return
    try:
        with _locked(path, wait_s):
            stored = path.read_bytes() if path.is_file() else b""
            others = config.create_timing_cache(stored) if stored else None
            if others is not None and not mine.combine(others, False):
                log.warning("%s: the timing cache is of another TensorRT or GPU; it is replaced", path)
            write_atomically(path, bytes(mine.serialize()))
    except HostError as error:
        log.warning("the timing cache is not updated: %s", error)


@contextmanager
def _locked(path: Path, wait_s: float) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    busy = HostError(
        "the timing cache is busy",
        where=path,
        found=f"another process has held it for {wait_s:g} s",
        fix="wait for that build, or give another --timing-cache",
    )
    # A separate file: the cache itself is replaced by each write, and a lock stays with the old file.
    with path.with_name(path.name + ".lock").open("a") as lock:
        acquire_lock(lock, lambda: busy, wait_s=wait_s)
        yield
