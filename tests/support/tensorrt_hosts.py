"""Which library a test runs against: the stand-in of two TensorRT versions everywhere, and real ones where they can run.

TensorRT-RTX compiles without a GPU, so tests of builds run on it too (fixture `compiler`). `STAND_IN_ONLY` lists the rest.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import fake_cuda
import fake_tensorrt
import pytest

from maskplan.pipeline.core.choices import Backend

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
HAS_TENSORRT = importlib.util.find_spec("tensorrt") is not None
HAS_GPU = Path("/proc/driver/nvidia/version").exists() or Path("/dev/dxg").exists()

# The oldest and the newest that we serve.
FAKE_VERSIONS = ("10.3.0", "11.4.0.106")
_REAL = "on this GPU"

HOSTS = (
    *FAKE_VERSIONS,
    pytest.param(
        _REAL,
        marks=[
            pytest.mark.tensorrt,
            pytest.mark.skipif(not HAS_TENSORRT, reason="TensorRT is not installed"),
            pytest.mark.skipif(not HAS_GPU, reason="TensorRT needs an NVIDIA driver, and there is none"),
        ],
    ),
)


RTX = "tensorrt-rtx"
NEEDS_RTX = pytest.mark.skipif(not HAS_RTX, reason="TensorRT-RTX is not installed: pip install 'maskplan[rtx]'")
COMPILERS = (*FAKE_VERSIONS, pytest.param(RTX, marks=NEEDS_RTX))

# Files of tests/engines/trt that only the stand-in can run, and why.
STAND_IN_ONLY = {
    "test_calibrator.py": "the implicit INT8 mode: TensorRT-RTX has none, and calibration runs on a GPU",
    "test_clocks.py": "clocks of a GPU",
    "test_gpu_contract.py": "plans that run: a GPU; on a GPU host the real TensorRT runs it too",
    "test_installation.py": "packages that are missing, damaged or too old, which TensorRT-RTX as installed is not",
    "test_timing_cache.py": "timing caches: without effect in TensorRT-RTX, and refused",
    "test_trt_build.py": "options that TensorRT-RTX refuses, inspection of plans, which needs a driver, and failures at"
    " will: a library that does not start, no memory",
    "test_trt_run.py": "plans that run: a GPU",
    "test_trt_shapes.py": "the graph that the parser was given, which only the stand-in's plans contain",
    "test_trtexec.py": "trtexec and what it wrote",
}


def install_compiler(name: str, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The stand-in of a version, and a GPU for it, or the real TensorRT-RTX; the backend."""
    if name == RTX:
        return "tensorrt-rtx"
    fake_tensorrt.install(name, fake_cuda.install(monkeypatch), monkeypatch)
    return "tensorrt"


def install_host(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in of a version, and a GPU for it; nothing where the real one is to be used."""
    if host != _REAL:
        fake_tensorrt.install(host, fake_cuda.install(monkeypatch), monkeypatch)
