"""A small half-precision network with one 2:4 convolution, and the stand-ins for TensorRT and the GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fake_cuda
import fake_tensorrt
import pytest
from small_net import small_net
from tensorrt_hosts import COMPILERS, FAKE_VERSIONS, install_compiler

from maskplan.pipeline.core.choices import Backend


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> fake_cuda.World:
    return fake_cuda.install(monkeypatch)


@pytest.fixture(params=FAKE_VERSIONS)
def trt(request: pytest.FixtureRequest, gpu: fake_cuda.World, monkeypatch: pytest.MonkeyPatch) -> fake_tensorrt.Control:
    """TensorRT of the oldest and the newest version that we serve."""
    return fake_tensorrt.install(request.param, gpu, monkeypatch)


@pytest.fixture(params=COMPILERS)
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The backend of a library that builds here: TensorRT, of the oldest and the newest version, and TensorRT-RTX itself."""
    return install_compiler(request.param, monkeypatch)


@pytest.fixture
def another(gpu: fake_cuda.World, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], fake_tensorrt.Control]:
    """Put another version in place."""
    return lambda version: fake_tensorrt.install(version, gpu, monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Half precision within, float32 at its ends, as we export."""
    return small_net(tmp_path / "net.onnx", "float16")
