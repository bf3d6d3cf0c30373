"""Messages of TensorRT: which are captured, quoted and understood."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
from fake_tensorrt import Control
from plan_builds import build

from maskplan.engines.sidecar import read_engine
from maskplan.engines.trt.log_capture import TrtLogCapture
from maskplan.engines.trt.versions import LIBRARIES, import_library
from maskplan.pipeline.core.choices import Backend
from maskplan.pipeline.core.errors import HostError, InputError


@pytest.mark.parametrize(
    ("lines", "note"),
    [
        (
            [
                "(Sparsity) Found 39 layer(s) eligible to use sparse tactics",
                "(Sparsity) Chose 12 layer(s) using sparse tactics",
            ],
            "found 39 layers eligible, chose 12",
        ),
        (
            [
                "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: mix, mix2 + relu",
                "(Sparsity) Chose 1 layer(s) using sparse tactics: mix",
                "(Sparsity) Found 1 layer(s) eligible to use sparse tactics: other",
                "(Sparsity) Chose 0 layer(s) using sparse tactics",
            ],
            "found 2 layers eligible, chose 1; found 1 layers eligible, chose 0;"
            " eligible: mix, mix2 + relu, other; chosen: mix",
        ),
        (["(Sparsity) Perhaps"], "1 lines could not be parsed"),
    ],
)
def test_what_the_builder_logs_of_sparsity_is_kept_with_the_plan(
    trt: Control, source: Path, lines: list[str], note: str
) -> None:
    trt.sparsity = (*lines, "an ordinary line")
    record = build(source)
    assert record.notes == (f"TensorRT's log: {note}",)
    assert read_engine(record.path).notes == record.notes


def test_every_listener_hears_all_for_as_long_as_it_lives(trt: Control, source: Path) -> None:
    """TensorRT takes one logger for the process; a second build must not lose what a first began."""
    import tensorrt

    first = TrtLogCapture(tensorrt)
    second = TrtLogCapture(tensorrt)
    assert first.logger is second.logger
    trt.failures.add("build")
    with pytest.raises(InputError, match="Could not find any implementation"):
        build(source)
    for log_capture in (first, second):
        assert log_capture.errors == ["Could not find any implementation for node conv1."]
        assert log_capture.warnings == []
    gone = weakref.ref(first)
    del first, log_capture
    gc.collect()
    assert gone() is None


def test_a_warning_tells_why_where_there_is_no_error(trt: Control, source: Path) -> None:
    """Some versions speak of a CUDA that does not start as a warning only."""
    trt.failures.add("builder")
    trt.says = ("WARNING", "Unable to determine GPU memory usage: CUDA driver version is insufficient")
    with pytest.raises(HostError, match="CUDA driver version is insufficient"):
        build(source)


MEMORY = (
    "Cuda Runtime (out of memory)",
    "OutOfMemory Error in computeCosts: 0",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "Requested amount of GPU memory (1024 bytes) could not be allocated. There may not be enough free memory.",
    "GPU memory allocation error during getBestTactic: conv",
    "Could not find any implementation for node conv1 due to insufficient workspace. See verbose log.",
    "Skipping tactic 3 due to insufficient memory on requested size of 8589934592",
    "Tactic Device request: 1146MB Available: 100MB. Device memory is insufficient to use tactic.",
    "Cuda failure: 2",
    "CUDA initialization failure with error: 2",
)


@pytest.mark.parametrize("message", MEMORY)
def test_every_way_to_say_that_memory_does_not_suffice_is_known(trt: Control, source: Path, message: str) -> None:
    trt.failures.add("build")
    trt.says = ("ERROR", message)
    with pytest.raises(HostError, match="insufficient GPU memory for the build") as caught:
        build(source)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "message",
    [
        "Could not find any implementation for node conv1.",
        "CUDA initialization failure with error: 35",
        "Cuda failure: 222",
        "Cuda failure: 700",
        "CUDA driver version is insufficient for CUDA runtime version",
        "Memory usage of plan: 2 MiB",
    ],
)
def test_and_other_failures_are_not_taken_for_it(trt: Control, source: Path, message: str) -> None:
    trt.failures.add("build")
    trt.says = ("ERROR", message)
    with pytest.raises(InputError, match="cannot build the model"):
        build(source)


def test_lines_about_sparsity_and_errors_are_kept_apart(compiler: Backend) -> None:
    trt = import_library(compiler)
    log_capture = TrtLogCapture(trt)
    log_capture.logger.log(trt.ILogger.INFO, "(Sparsity) Chose 2 layer(s) using sparse tactics")
    log_capture.logger.log(trt.ILogger.WARNING, "something else")
    assert log_capture.reason() == "something else"
    log_capture.logger.log(trt.ILogger.INTERNAL_ERROR, "an assertion failed")
    assert log_capture.sparsity == ["(Sparsity) Chose 2 layer(s) using sparse tactics"]
    assert log_capture.warnings == ["something else"]
    assert log_capture.errors == ["an assertion failed"]
    assert log_capture.reason() == "an assertion failed"
    assert TrtLogCapture(trt).reason() == f"{LIBRARIES[compiler].name} gave no reason"


def test_a_missing_driver_is_no_reason_where_none_is_needed() -> None:
    """TensorRT-RTX logs it beside whatever else fails; TensorRT needs a driver."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'maskplan[rtx]'")
    trt = import_library("tensorrt-rtx")
    log_capture = TrtLogCapture(trt)
    log_capture.logger.log(trt.ILogger.ERROR, "Invalid optimization profiles")
    log_capture.logger.log(
        trt.ILogger.ERROR, "Cuda Runtime (In catchCudaError at checkMacros.cpp:250 (cudaError 35: old))"
    )
    assert log_capture.reason() == "Invalid optimization profiles"
    del log_capture.errors[0]
    assert "cudaError 35" in log_capture.reason()
