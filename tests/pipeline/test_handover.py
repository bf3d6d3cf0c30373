"""A finished folder on another host, where there is no torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_line import NO_TORCH, STAGES, WITHOUT, Line, Stages, digests, read_json, stages_of


def run_without(packages: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, packages, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def moved(line: Line, tmp_path: Path) -> Line:
    """The finished folder on what may be another host: moved, the original gone."""
    first = Path(shutil.copytree(line.out, tmp_path / "first" / "out"))
    (tmp_path / "host").mkdir()
    elsewhere = Path(shutil.move(first, tmp_path / "host" / "elsewhere"))
    shutil.rmtree(tmp_path / "first")
    return Line(elsewhere, line.options)


BEFORE_BUILD = STAGES[: STAGES.index("build-sparse")]


def test_on_a_host_without_torch_the_tensorrt_backend_starts_at_the_build(moved: Line) -> None:
    before = digests(moved.out)

    done = run_without(
        NO_TORCH, "engine", *moved.options, "--backend", "tensorrt", "--out", moved.out, cwd=moved.out.parent
    )

    assert done.returncode == 3, done.stderr
    assert stages_of(done.stderr) == Stages(("build-sparse",), BEFORE_BUILD)
    assert "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("error:") :]
    assert "TensorRT is not installed" in message
    assert "pip install 'maskplan[tensorrt]'" in message
    assert digests(moved.out) == before


def test_a_refused_handover_does_not_spoil_the_folder_for_the_old_backend(moved: Line, cli: Callable[..., Any]) -> None:
    cli("engine", *moved.options, "--backend", "tensorrt", "--out", moved.out)

    ran = cli("engine", *moved.options, "--out", moved.out)

    assert ran.code == 0
    assert set(stages_of(ran.err).made) <= {"check"}


def test_on_a_host_without_torch_the_same_backend_does_nothing_again(moved: Line) -> None:
    done = run_without(
        NO_TORCH, "engine", *moved.options, "--backend", "onnxruntime", "--out", moved.out, cwd=moved.out.parent
    )

    assert done.returncode == 0, done.stderr
    # The report states why the backend was taken, which is another reason now.
    assert set(stages_of(done.stderr).made) <= {"report"}
    assert set(STAGES) - {"report"} <= set(stages_of(done.stderr).reused)
    assert read_json(moved.out / "report.json")["engine"]["backend_reason"] == "requested"


def test_on_a_host_without_torch_everything_from_the_build_on_runs(moved: Line, tmp_path: Path) -> None:
    arguments = ("--precision", "fp16", "--backend", "onnxruntime", "--repository", tmp_path / "models")

    done = run_without(NO_TORCH, "engine", *moved.options, *arguments, "--out", moved.out, cwd=moved.out.parent)

    assert done.returncode == 0, done.stderr
    assert set(BEFORE_BUILD) - {"check"} <= set(stages_of(done.stderr).reused)
    assert {"build-sparse", "build-dense", "compare", "time", "report"} <= set(stages_of(done.stderr).made)
    assert (tmp_path / "models" / "small_net" / "1" / "model.onnx").is_file()


def test_without_torch_an_unfinished_folder_says_what_to_install(moved: Line) -> None:
    (moved.out / "sparse.onnx").unlink()

    done = run_without(NO_TORCH, "engine", *moved.options, "--out", moved.out, cwd=moved.out.parent)

    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "PyTorch is not installed" in done.stderr
    assert "maskplan[learn]" in done.stderr
