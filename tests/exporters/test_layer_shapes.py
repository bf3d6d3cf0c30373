"""Weights and the sizes they work on, read from graphs made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.layer_shapes import LayerShape, shaped_weights

GENERATOR = np.random.default_rng(0)


def graph(
    nodes: list[onnx.NodeProto], size: Sequence[int | str], dtype: int = TensorProto.FLOAT, **tensors: Any
) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", dtype, size)],
        [helper.make_tensor_value_info("y", dtype, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def noise(*shape: int) -> np.ndarray[Any, Any]:
    return GENERATOR.normal(size=shape).astype(np.float32)


def conv(**attributes: Any) -> onnx.ModelProto:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], "conv", **attributes)]
    return graph(nodes, ["batch", 8, 11, 13], w=noise(6, 8, 3, 2))


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"pads": [1, 2, 3, 0], "strides": [2, 3]},
        {"dilations": [3, 2], "pads": [1, 1, 1, 1]},
        {"auto_pad": "VALID"},
    ],
)
def test_a_convolutions_output_is_as_large_as_onnx_runtimes(attributes: dict[str, Any]) -> None:
    model = conv(**attributes)
    found = shaped_weights(model, {"w"})
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"x": noise(2, 8, 11, 13)})
    assert found.shapes["w"].output == wanted.shape[2:]
    assert (found.shapes["w"].height, found.shapes["w"].width) == (11, 13)
    assert (found.weights["w"] == numpy_helper.to_array(model.graph.initializer[0])).all()
    assert found.skipped == {}


def test_sizes_behind_other_layers_are_inferred_with_a_dynamic_batch() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h"], "first", strides=[2, 2]),
        helper.make_node("Relu", ["h"], ["i"], "relu"),
        helper.make_node("Conv", ["i", "b"], ["y"], "second"),
    ]
    model = graph(
        nodes,
        ["batch", 4, 9, 9],
        TensorProto.FLOAT16,
        a=noise(8, 4, 3, 3).astype(np.float16),
        b=noise(8, 8, 1, 1).astype(np.float16),
    )
    found = shaped_weights(model, {"b"})
    assert found.shapes == {"b": LayerShape(8, 8, 1, 1, 4, 4)}
    assert found.weights["b"].dtype == np.float32


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_linear_layer_is_a_convolution_of_one_pixel(transposed: int) -> None:
    weight = noise(5, 12)
    stored = weight if transposed else np.ascontiguousarray(weight.T)
    model = graph([helper.make_node("Gemm", ["x", "w"], ["y"], "head", transB=transposed)], ["batch", 12], w=stored)
    found = shaped_weights(model, {"w"})
    assert found.shapes == {"w": LayerShape(5, 12, 1, 1, 1, 1)}
    assert (found.weights["w"][:, :, 0, 0] == weight).all()


def test_a_matmul_has_a_row_for_each_token() -> None:
    model = graph([helper.make_node("MatMul", ["x", "w"], ["y"], "mix")], ["batch", 7, 12], w=noise(12, 5))
    assert shaped_weights(model, {"w"}).shapes == {"w": LayerShape(5, 12, 1, 1, 7, 1)}


def test_only_the_named_weights_are_read() -> None:
    assert shaped_weights(conv(), {"other"}).shapes == {}


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (conv(auto_pad="SAME_UPPER"), "auto_pad"),
        (graph([helper.make_node("Conv", ["x", "w"], ["y"])], ["n", 8, "h", 9], w=noise(4, 8, 1, 1)), "not known"),
        (graph([helper.make_node("Conv", ["x", "w"], ["y"])], ["n", 8, 9], w=noise(4, 8, 3)), "2-D convolution"),
        (graph([helper.make_node("MatMul", ["x", "w"], ["y"])], [2, 8, 4], w=noise(2, 4, 8)), "not one matrix"),
        (graph([helper.make_node("MatMul", ["w", "x"], ["y"])], [4, 9], w=noise(8, 4)), "not known"),
    ],
)
def test_weights_of_unknown_shape_are_skipped_with_the_reason(model: onnx.ModelProto, why: str) -> None:
    found = shaped_weights(model, {"w"})
    assert (dict(found.shapes), dict(found.weights)) == ({}, {})
    assert why in found.skipped["w"]
