"""Graphs for tests of FP16 conversion, and ways to run them: by ONNX Runtime, and exactly as typed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Array = npt.NDArray[Any]
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def model_of(
    nodes: Sequence[onnx.NodeProto],
    tensors: dict[str, Array] | None = None,
    outputs: Sequence[str] = ("y",),
    shape: Sequence[int | str] = ("n", 8, 4, 4),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", FLOAT, shape)],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in (tensors or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def node(op: str, inputs: Sequence[str], output: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], **attributes)


def constant(name: str, value: Array) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))


def run(model: onnx.ModelProto, x: Array, *, optimized: bool = True) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def tensors_of(model: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def assert_close_in_ort(model: onnx.ModelProto, half: onnx.ModelProto) -> None:
    for batch in (1, 3):
        x = np.random.default_rng(batch).normal(size=(batch, 8, 4, 4)).astype(np.float32)
        for expected, found in zip(run(model, x), run(half, x), strict=True):
            assert found.dtype == np.float32
            assert found.shape == expected.shape
            assert np.allclose(found, expected, rtol=1e-2, atol=1e-2)


def noise(*shape: int, scale: float = 0.3) -> npt.NDArray[np.float32]:
    return (scale * np.random.default_rng(0).normal(size=shape)).astype(np.float32)


def assert_valid(model: onnx.ModelProto) -> dict[str, int]:
    """Types by name, once the checker accepts the file and every type and shape follows strictly."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    for output, shaped in zip(model.graph.output, inferred.graph.output, strict=True):
        output.CopyFrom(shaped)
    onnx.checker.check_model(model, full_check=True)
    values = (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    assert all(name in types for n in model.graph.node for name in n.output)
    return types


def exact(model: onnx.ModelProto, x: Array) -> list[Array]:
    """Every step in the type that is written; ONNX Runtime's CPU kernels compute FP16 in FP32 and never overflow."""
    with np.errstate(all="ignore"):
        found: list[Array] = ReferenceEvaluator(model).run(None, {"x": x})
    return found
