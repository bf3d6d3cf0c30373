"""The timing cache: kept between builds, shared between processes, replaced when it belongs to another TensorRT."""

from __future__ import annotations

import fcntl
import logging
from pathlib import Path

import pytest
from fake_tensorrt import Control
from plan_builds import build

from maskplan.pipeline.core.errors import HostError


def test_the_timing_cache_is_kept_between_builds_and_shared(trt: Control, source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "timing.cache"
    build(source, timing_cache=cache)
    first = set(cache.read_bytes().splitlines())
    other = first.copy().pop().replace(b"tactic 0", b"tactic of another process")

    given = []

    def meanwhile() -> None:
        given.append(bytes(trt.config.get_timing_cache().serialize()))
        cache.write_bytes(cache.read_bytes() + b"\n" + other)
        trt.during_build = lambda: None

    trt.during_build = meanwhile
    build(source, timing_cache=cache)
    assert given == [b"\n".join(first)]
    lines = set(cache.read_bytes().splitlines())
    assert first < lines
    assert other in lines
    assert len(lines) == 3


@pytest.mark.parametrize("stored", [b"TensorRT 9.0 tactic 1", b"no cache at all"])
def test_a_cache_of_another_tensorrt_is_begun_anew(
    trt: Control, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, stored: bytes
) -> None:
    cache = tmp_path / "timing.cache"
    cache.write_bytes(stored)
    with caplog.at_level(logging.WARNING):
        build(source, timing_cache=cache)
    assert "belongs to another TensorRT version or GPU; starting a new one" in caplog.text
    assert b"tactic 0" in cache.read_bytes()
    assert stored not in cache.read_bytes()


def test_a_cache_that_another_tensorrt_wrote_during_the_build_is_replaced(
    trt: Control, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "timing.cache"
    trt.during_build = lambda: cache.write_bytes(b"TensorRT 9.0 tactic 1") and None
    with caplog.at_level(logging.WARNING):
        build(source, timing_cache=cache)
    assert "replacing it" in caplog.text
    assert b"tactic 0" in cache.read_bytes()
    assert b"TensorRT 9.0" not in cache.read_bytes()


def test_a_busy_timing_cache_is_told_before_the_build(trt: Control, source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    with (tmp_path / "timing.cache.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(HostError, match="the timing cache is locked"):
            build(source, timing_cache=cache, timing_cache_wait_s=0.2)
    assert trt.builds == 0
    assert not cache.exists()


def test_a_cache_that_gets_busy_during_the_build_costs_no_plan(
    trt: Control, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "timing.cache"
    held = []

    def meanwhile() -> None:
        if not held:
            held.append((tmp_path / "timing.cache.lock").open("a"))
            fcntl.flock(held[0], fcntl.LOCK_EX)

    trt.during_build = meanwhile
    with caplog.at_level(logging.WARNING):
        record = build(source, timing_cache=cache, timing_cache_wait_s=0.2)
    held[0].close()
    assert record.path.is_file()
    assert "not updated" in caplog.text
    assert not cache.exists()


def test_a_gpu_that_makes_no_cache_builds_without(
    trt: Control, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trt.failures.add("cache")
    with caplog.at_level(logging.WARNING):
        assert build(source, timing_cache=tmp_path / "timing.cache").path.is_file()
    assert "failed to create a timing cache" in caplog.text
