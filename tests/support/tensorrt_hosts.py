"""Which TensorRT a test runs against: the stand-in of two versions everywhere, and the real one on a GPU host."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import fake_cuda
import fake_tensorrt
import pytest

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


def install_host(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in of a version, and a GPU for it; nothing where the real one is to be used."""
    if host != _REAL:
        fake_tensorrt.install(host, fake_cuda.install(monkeypatch), monkeypatch)
