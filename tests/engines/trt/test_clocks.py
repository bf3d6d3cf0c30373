"""The GPU's clocks, as a stand-in of nvidia-smi tells them; its lines are of the format that the query asks for."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest
from fake_cuda import World

from maskplan.engines.trt.clocks import parse_clocks, watch_clocks
from maskplan.pipeline.core.reports import GpuClocks

pytestmark = pytest.mark.usefixtures("gpu")


def smi(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a script of that name first in the path."""
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_samples_are_summed_up() -> None:
    told = "1980, 2619, 0x0000000000000000, 41, 310.5\n1500, 2619, 0x0000000000000024, 64, 699.9\n1980, 2619, 0x0, 50, 400\n"
    held = ("power cap", "software thermal slowdown")
    assert parse_clocks(told) == GpuClocks(3, 1980, 1500, 2619, held, 64, 699.9)


def test_an_idle_gpu_or_clocks_set_by_its_owner_are_not_held_down() -> None:
    found = parse_clocks("345, 2619, 0x0000000000000001, 30, 70\n1200, 2619, 0x0000000000000002, 30, 70\n")
    assert found is not None
    assert found.throttle_reasons == ()


@pytest.mark.parametrize("line", ["", "[N/A], 2619, 0x0, 30, 70", "1980, 26", "No devices were found", "1,2,z,4,5"])
def test_lines_that_cannot_be_read_are_left_out(line: str) -> None:
    assert parse_clocks(line) is None
    assert parse_clocks(f"{line}\n1980, 2619, 0x0, 30, 70\n") == GpuClocks(1, 1980, 1980, 2619, (), 30, 70)


def test_the_gpu_is_watched_while_the_block_runs(tmp_path: Path, gpu: World, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.bus_id = "0000:3B:00.0"
    asked = tmp_path / "asked"
    smi(tmp_path, f'echo "$@" > {asked}; echo "1980, 2619, 0x4, 41, 310.5"; exec sleep 60', monkeypatch)
    started = time.monotonic()
    with watch_clocks() as watch:
        while not asked.is_file() or not asked.read_text():
            assert time.monotonic() - started < 30
            time.sleep(0.01)
        time.sleep(0.2)
        assert watch.clocks is None
        ended = time.monotonic()
    assert watch.clocks == GpuClocks(1, 1980, 1980, 2619, ("power cap",), 41, 310.5)
    # The watch ends with the block, not with nvidia-smi, and does not wait for it.
    assert time.monotonic() - ended < 4
    # By its address: CUDA and nvidia-smi number GPUs differently, and CUDA_VISIBLE_DEVICES is CUDA's alone.
    assert "--id=0000:3B:00.0 " in asked.read_text()
    assert "--loop-ms" in asked.read_text()
    assert "clocks_throttle_reasons.active" in asked.read_text()


def test_an_nvidia_smi_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is ignored stays ignored in what a shell becomes."""
    smi(tmp_path, f"trap '' TERM; touch {tmp_path / 'ready'}; exec sleep 60", monkeypatch)
    monkeypatch.setattr("maskplan.engines.trt.clocks._WAIT_S", 0.2)
    with watch_clocks() as watch:
        started = time.monotonic()
        while not (tmp_path / "ready").exists():
            assert time.monotonic() - started < 30
            time.sleep(0.01)
        ended = time.monotonic()
    assert watch.clocks is None
    assert time.monotonic() - ended < 30


def test_without_nvidia_smi_nothing_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with watch_clocks() as watch:
        pass
    assert watch.clocks is None


def test_without_a_gpu_nvidia_smi_is_not_asked(tmp_path: Path, gpu: World, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.devices = 0
    smi(tmp_path, f"touch {tmp_path / 'asked'}", monkeypatch)
    with watch_clocks() as watch:
        pass
    assert watch.clocks is None
    assert not (tmp_path / "asked").exists()


def test_a_failure_inside_the_block_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, "exit 9", monkeypatch)
    with pytest.raises(KeyError), watch_clocks() as watch:
        raise KeyError
    assert watch.clocks is None
