"""Small ONNX graphs for NVIDIA's compiler: some that it takes, some that it refuses; and whether it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import OnnxModel

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX is not installed: pip install 'maskplan[rtx]'",
)

CONV = helper.make_node("Conv", ["input", "conv.weight"], ["c"], "layer.conv", pads=[1, 1, 1, 1])
RELU = helper.make_node("Relu", ["c"], ["y"], "layer.relu")
NODES = {
    "accepted": RELU,
    "unsupported": helper.make_node("Unique", ["c"], ["y"], "layer.unique"),
    "made_up": helper.make_node("FancyNorm", ["c"], ["y"], "layer.fancy", domain="com.example"),
    "unnamed": helper.make_node("FancyNorm", ["c"], ["y"], domain="com.example"),
    "mixed_types": helper.make_node("Add", ["c", "half"], ["y"], "layer.add"),
    "fixed_batch_inside": helper.make_node("Reshape", ["c", "shape"], ["y"], "layer.reshape"),
    "asymmetric": helper.make_node("QuantizeLinear", ["c", "scale", "zero_point"], ["y"], "layer.quantize"),
}


def graph(
    path: Path, case: str = "accepted", *, shape: Sequence[int | str] = ("batch", 8, 8, 8), dtype: str = "FLOAT"
) -> OnnxModel:
    """Write a convolution that conforms to 2:4, followed by the node of the case."""
    weight = np.random.default_rng(0).normal(size=(8, 8, 3, 3)).astype(np.float32)
    weight[:, ::2] = 0
    stored = {
        "conv.weight": weight,
        "half": np.ones((1, 8, 1, 1), np.float16),
        "shape": np.array([1, 512], np.int64),
        "scale": np.array(0.1, np.float32),
        "zero_point": np.array(3, np.int8),
    }
    node = NODES[case]
    body = helper.make_graph(
        [CONV, node],
        "graph",
        [helper.make_tensor_value_info("input", getattr(TensorProto, dtype), shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT8 if case == "asymmetric" else TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in stored.items() if n in (*CONV.input, *node.input)],
    )
    model = helper.make_model(
        body, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.example", 1)], ir_version=10
    )
    onnx.save(model, path)
    return describe_onnx(path)
