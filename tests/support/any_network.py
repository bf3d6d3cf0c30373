"""Small ONNX networks of several inputs and outputs, and an engine of plain functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from maskplan.engines.base import CallTiming
from maskplan.pipeline.core.artifacts import TensorSpec

Array = npt.NDArray[Any]


class FunctionEngine:
    """An engine that computes a function of its feeds, and records their shapes."""

    def __init__(
        self, inputs: list[TensorSpec], outputs: list[TensorSpec], compute: Callable[[Mapping[str, Array]], list[Array]]
    ) -> None:
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.last_timing: CallTiming | None = None
        self.calls: list[dict[str, tuple[int, ...]]] = []
        self._compute = compute

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.calls.append({name: np.shape(array) for name, array in feeds.items()})
        return dict(zip([spec.name for spec in self.outputs], self._compute(feeds), strict=True))

    def close(self) -> None:
        pass


def weights(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    values: Array = np.random.default_rng(seed).standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return values.astype(np.float32)


def save_net(
    path: Path,
    nodes: list[onnx.NodeProto],
    tensors: Mapping[str, Array],
    inputs: Mapping[str, list[int | str]],
    outputs: Mapping[str, list[int | str | None]],
) -> Path:
    """Write a float network, opset 19."""
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in part.items()]
        for part in (inputs, outputs)
    ]
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "net", *values, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path)
    return path


def box_head(path: Path, *, batch: int | str = "N") -> Path:
    """A detector's head as in YOLOv8: boxes by a softmax over 16 bins and a table of them, and scores."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w1"], ["a"], "stem", pads=[1] * 4, strides=[2, 2]),
        node("Relu", ["a"], ["b"], "relu"),
        node("Conv", ["b", "w2"], ["c"], "box", pads=[1] * 4),
        node("Reshape", ["c", "by_bin"], ["d"], "bins_of_side"),
        node("Transpose", ["d"], ["e"], "bins_first", perm=[0, 2, 1, 3]),
        node("Softmax", ["e"], ["f"], "softmax", axis=1),
        node("Conv", ["f", "bins"], ["g"], "dfl"),
        node("Reshape", ["g", "flat"], ["boxes"], "boxes_of_places"),
        node("Conv", ["b", "w3"], ["h"], "score"),
        node("Sigmoid", ["h"], ["scores"], "sigmoid"),
    ]
    tensors = {
        "w1": weights(16, 3, 3, 3),
        "w2": 4 * weights(64, 16, 3, 3, seed=1),
        "w3": weights(8, 16, 1, 1, seed=2),
        "bins": np.arange(16, dtype=np.float32).reshape(1, 16, 1, 1),
        "by_bin": np.array([0, 4, 16, -1]),
        "flat": np.array([0, 4, -1]),
    }
    outputs: dict[str, list[int | str | None]] = {"boxes": [batch, 4, 64], "scores": [batch, 8, 8, 8]}
    return save_net(path, nodes, tensors, {"x": [batch, 3, 16, 16]}, outputs)


def baked_batch(path: Path) -> Path:
    """A classifier whose batch is declared dynamic, with a 1 in its last Reshape."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w1"], ["a"], "first", pads=[1] * 4),
        node("Relu", ["a"], ["b"], "relu"),
        node("Conv", ["b", "w2"], ["c"], "second"),
        node("GlobalAveragePool", ["c"], ["d"], "pool"),
        node("Reshape", ["d", "shape"], ["y"], "flatten"),
    ]
    tensors = {"w1": weights(16, 3, 3, 3), "w2": weights(4, 16, 1, 1, seed=1), "shape": np.array([1, 4])}
    return save_net(path, nodes, tensors, {"x": ["N", 3, 8, 8]}, {"y": ["N", 4]})
