"""Graphs with Q/DQ for tests: a reader of any graph, and a graph of two layers with its integer arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]


class Read:
    """A graph by producers and readers of its tensors; independent of `maskplan.calibration.graph`, which it tests."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}

    def ops(self, *ops: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if node.op_type in ops]

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes for name in node.input if name == tensor]

    def dequantized(self, tensor: str) -> bool:
        return tensor in self.producers and self.producers[tensor].op_type == "DequantizeLinear"

    def scale(self, dequantized: str) -> Array:
        return self.stored[self.producers[dequantized].input[1]]


def two_layers(
    weight: Array,
    shape: Sequence[int],
    bias: Array | None = None,
    relu: bool = False,
    opset: int = 20,
    **attributes: Any,
) -> onnx.ModelProto:
    """`x` through one Conv (or MatMul, for a matrix) to `a`, and through a layer that reads it to `y`."""
    op = "Conv" if weight.ndim == 4 else "MatMul"
    channels = weight.shape[0] if op == "Conv" else weight.shape[1]
    tensors = {"w": weight, "v": np.ones((4, channels, 1, 1) if op == "Conv" else (channels, 4), np.float32)}
    if bias is not None:
        tensors["b"] = bias
    made = "c" if relu else "a"
    nodes = [helper.make_node(op, ["x", "w", *(["b"] if bias is not None else [])], [made], "first", **attributes)]
    nodes += [helper.make_node("Relu", ["c"], ["a"], "relu")] if relu else []
    nodes.append(helper.make_node(op, ["a", "v"], ["y"], "second"))
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(shape))],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def accumulate(x: Array, w: Array, stride: int = 1, pad: int = 0, group: int = 1) -> Array:
    """Integer convolution (n, C, H, W) * (K, C / group, R, S), summed in int64."""
    x = np.pad(x.astype(np.int64), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    k, c, r, s = w.shape
    high, wide = (x.shape[2] - r) // stride + 1, (x.shape[3] - s) // stride + 1
    out = np.zeros((x.shape[0], k, high, wide), np.int64)
    for channel in range(k):
        first = channel // (k // group) * c
        for i in range(high):
            for j in range(wide):
                window = x[:, first : first + c, i * stride : i * stride + r, j * stride : j * stride + s]
                out[:, channel, i, j] = (window * w[channel].astype(np.int64)).sum(axis=(1, 2, 3))
    return out
