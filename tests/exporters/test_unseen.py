"""What the check cannot read is unknown, never a pass: fused and integer operators, custom ones, a file without weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.conformance import CheckOptions, check_2to4
from maskplan.exporters.metadata import precision_of

SPARSE = np.tile(np.array([1, 0, 2, 0], np.float32), 16).reshape(8, 8, 1, 1)
STRICT = CheckOptions(strict=True)


def model_of(*nodes: onnx.NodeProto, **tensors: Any) -> onnx.ModelProto:
    """A conforming convolution before the nodes."""
    first = helper.make_node("Conv", ["x", "good"], ["a"], "good")
    stored = {"good": SPARSE, **tensors}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()]
    graph = helper.make_graph([first, *nodes], "g", ends[:1], ends[1:], initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("mine", 1)]
    return helper.make_model(graph, opset_imports=opsets)


INTEGERS = {"w": np.ones((8, 8, 1, 1), np.int8), "s": np.float32(1), "z": np.int8(0)}
UNSEEN = {
    "FusedConv": helper.make_node("FusedConv", ["a", "w"], ["y"], "odd", domain="com.microsoft", activation="Relu"),
    "QLinearConv": helper.make_node("QLinearConv", ["a", "s", "z", "w", "s", "z", "s", "z"], ["y"], "odd"),
    "ConvInteger": helper.make_node("ConvInteger", ["a", "w"], ["y"], "odd"),
    "MatMulInteger, weight first": helper.make_node("MatMulInteger", ["w", "a"], ["y"], "odd"),
    "QGemm": helper.make_node("QGemm", ["a", "s", "z", "w", "s", "z"], ["y"], "odd", domain="com.microsoft"),
    "a plugin": helper.make_node("DeformablePatch", ["a", "w"], ["y"], "odd", domain="mine"),
    "a convolution in another domain": helper.make_node(
        "Conv", ["a", "w"], ["y"], "odd", domain="com.ms.internal.nhwc"
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
@pytest.mark.parametrize("behind", [False, True])
def test_a_weight_that_cannot_be_read_leaves_no_pass(name: str, behind: bool) -> None:
    odd = onnx.NodeProto()
    odd.CopyFrom(UNSEEN[name])
    nodes = [odd]
    if behind:
        odd.input[:] = ["i" if operand == "w" else operand for operand in odd.input]
        nodes.insert(0, helper.make_node("Identity", ["w"], ["i"]))
    model = model_of(*nodes, **INTEGERS)
    for options in (CheckOptions(), STRICT):
        report = check_2to4(model, options)
        assert (report.verdict, report.passed, report.conforming, report.unknown) == ("unknown", False, 1, 1)
        assert "odd" in str(report.reason)
    excused = check_2to4(model, CheckOptions(strict=True, allow_dense=("odd",)))
    assert (excused.verdict, excused.dense_by_choice) == ("pass", 1)
    assert check_2to4(model, CheckOptions(masked=("good",))).passed
    assert not check_2to4(model, CheckOptions(masked=("good",), strict=True)).passed


def test_a_file_in_which_nothing_is_found_is_unknown() -> None:
    model = model_of(helper.make_node("Relu", ["a"], ["y"]))
    del model.graph.node[0]
    assert (check_2to4(model).verdict, check_2to4(model).reason) == ("unknown", "no weight was found")


def test_operators_that_never_run_sparse_and_tables_of_plugins_hide_nothing() -> None:
    lstm = helper.make_node("LSTM", ["a", "w", "w"], ["y"], "lstm", hidden_size=2)
    report = check_2to4(model_of(lstm, w=np.ones((1, 8, 2), np.float32)), STRICT)
    assert (report.verdict, report.weights[1].verdict) == ("pass", "ineligible")
    assert report.weights[1].reason == "unsupported_op"
    nms = helper.make_node("EfficientNMS_TRT", ["a", "a", "anchors"], ["y"], domain="mine")
    assert check_2to4(model_of(nms, anchors=np.ones((100, 4), np.float32)), STRICT).passed


@pytest.mark.parametrize(
    ("name", "precision"), [("QLinearConv", "int8"), ("ConvInteger", "int8"), ("FusedConv", "fp32")]
)
def test_operators_on_integers_are_int8(name: str, precision: str) -> None:
    assert precision_of(model_of(UNSEEN[name], **INTEGERS)) == precision
