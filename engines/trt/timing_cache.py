"""The timing cache: the builder's measurements, kept between runs and shared between processes."""

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
    """Load the file into a builder configuration; a cache of another TensorRT version or GPU is replaced by an empty one.

    Raises:
        HostError: Another process has locked the file for longer than `wait_s`.
    """
    with _locked(path, wait_s):
        stored = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(stored) if stored else None
    if cache is None or not config.set_timing_cache(cache, False):
        if stored:
            log.warning("%s: the timing cache belongs to another TensorRT version or GPU; starting a new one", path)
        fresh = config.create_timing_cache(b"")
        if fresh is None or not config.set_timing_cache(fresh, False):
            log.warning("TensorRT failed to create a timing cache; the measurements of this build are not saved")


def save_timing_cache(config: Any, path: Path, wait_s: float) -> None:
    """Merge this build's measurements into the file; if it is locked, log a warning and leave it unchanged."""
    own_cache = config.get_timing_cache()
    if own_cache is None:
        return
    try:
        with _locked(path, wait_s):
            stored = path.read_bytes() if path.is_file() else b""
            stored_cache = config.create_timing_cache(stored) if stored else None
            if stored_cache is not None and not own_cache.combine(stored_cache, False):
                log.warning("%s: the timing cache belongs to another TensorRT version or GPU; replacing it", path)
            write_atomically(path, bytes(own_cache.serialize()), option="--timing-cache")
    except HostError as error:
        log.warning("the timing cache is not updated: %s", error)


@contextmanager
def _locked(path: Path, wait_s: float) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    busy = HostError(
        "the timing cache is locked",
        where=path,
        found=f"another process has locked it for {wait_s:g} s",
        fix="wait for the other build, or use another --timing-cache",
    )
    # A separate lock file, because each write replaces the cache file and a lock would stay with the old one.
    with path.with_name(path.name + ".lock").open("a") as lock:
        acquire_lock(lock, lambda: busy, wait_s=wait_s)
        yield
