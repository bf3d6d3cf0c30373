"""The script for a GPU, tried on a CPU: every part, what a part that hangs or fails costs, and what is saved by then."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from maskplan.engines.trt.versions import is_installed

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu


def task(found: list[Any], seconds: float = 60) -> gpu.Task:
    return gpu.Task(True, Path(), time.monotonic() + seconds, found.append)


def test_the_probe_accepts_masks_in_both_types() -> None:
    found: list[Any] = []
    gpu.probe(task(found))
    assert {dtype: report["verdict"] for dtype, report in found[-1].items()} == {"fp16": "pass", "int8": "pass"}


def test_libraries_of_tensorrt_are_found_by_name_and_the_search_ends_in_time(tmp_path: Path) -> None:
    for name in ("lib/libnvinfer.so.10", "lib/deep/libtensorrt_rtx.so.1", "lib/libother.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = gpu.libraries([tmp_path, tmp_path / "missing"], time.monotonic() + 60)
    assert [Path(name).name for name in found] == ["libtensorrt_rtx.so.1", "libnvinfer.so.10"]
    assert gpu.libraries([tmp_path], time.monotonic() - 1)[-1].startswith("(stopped")


def test_a_part_that_hangs_keeps_what_it_had_found(tmp_path: Path) -> None:
    (tmp_path / "part.json").write_text('{"rows": 1}')
    args = argparse.Namespace(data=tmp_path, dry_run=True)
    part = gpu.run_part("host", args, 0.2, tmp_path / "part.json")
    assert part["error"] == "stopped after 0 s"
    assert part["found"] == {"rows": 1}


@pytest.mark.slow
def test_a_dry_run_tries_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--out", str(out), "--minutes", "20"])
    gpu.main()
    found = json.loads(out.read_text())
    assert {name: part["error"] for name, part in found["parts"].items() if name != "rtx"} == dict.fromkeys(
        ("host", "probe", "step", "accuracy")
    )
    parts = {name: part["found"] for name, part in found["parts"].items()}
    assert "libraries" in parts["host"]
    assert set(parts["step"]["resnet18, batch 2"]) == {"ordinary, nchw, s", "ordinary, channels_last, s", "masks, s"}
    assert set(parts["accuracy"]["resnet20"]["rows"]) == {"dense", "magnitude, recalibrated", "maskplan, recalibrated"}
    if is_installed("tensorrt_rtx"):
        assert {row["accepted"] for row in parts["rtx"].values()} == {True}
        assert all("ran" in row for row in parts["rtx"].values()), "runs are tried, and fail without a GPU"
