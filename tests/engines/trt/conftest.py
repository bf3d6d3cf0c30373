"""A small half-precision network with one 2:4 convolution, and the stand-ins for TensorRT and the GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fake_cuda
import fake_tensorrt
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

VERSIONS = ("10.3.0", "11.4.0.106")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> fake_cuda.World:
    return fake_cuda.install(monkeypatch)


@pytest.fixture(params=VERSIONS)
def trt(request: pytest.FixtureRequest, gpu: fake_cuda.World, monkeypatch: pytest.MonkeyPatch) -> fake_tensorrt.Control:
    """TensorRT of the oldest and the newest version that we serve."""
    return fake_tensorrt.install(request.param, gpu, monkeypatch)


@pytest.fixture
def another(gpu: fake_cuda.World, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], fake_tensorrt.Control]:
    """Put another version in place."""
    return lambda version: fake_tensorrt.install(version, gpu, monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Half precision within, float32 at its ends, as we export."""
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(16, 16, 3, 3)).astype(np.float16) / 8
    mix[:, ::2] = 0
    tensors = {
        "stem": generator.normal(size=(16, 3, 3, 3)).astype(np.float16),
        "mix": mix,
        "head": generator.normal(size=(5, 16)).astype(np.float16),
    }
    nodes = [
        helper.make_node("Cast", ["input"], ["half"], "cast", to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["half", "stem"], ["a"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Conv", ["b", "mix"], ["c"], "mix", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["e"], "pool"),
        helper.make_node("Flatten", ["e"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "head"], ["g"], "head", transB=1),
        helper.make_node("Cast", ["g"], ["logits"], "back", to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    return path
