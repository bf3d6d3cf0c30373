"""Unfolded inputs times the weight must be what ONNX Runtime computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.layer_inputs import (
    COMPUTED_SHAPE,
    IN_LOOP,
    QUANTIZED,
    TWO_LAYOUTS,
    ObservedLayer,
    observed_graph,
    observed_layers,
    unfold,
    unfolded_shape,
)
from maskplan.exporters.weights import weight_uses
from maskplan.pipeline.core.ort_session import open_session
from maskplan.pipeline.masking.layerwise import unfold_weight

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def model_of(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], inputs: dict[str, Any], out: str = "y"
) -> onnx.ModelProto:
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    ends = [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", given, ends, [numpy_helper.from_array(w, n) for n, w in weights.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def layers_of(model: onnx.ModelProto) -> tuple[tuple[ObservedLayer, ...], dict[str, str]]:
    uses = [use for use in weight_uses(model) if use.tensor is not None]
    names = {id(use.tensor): use.name for use in uses}
    layers, reasons = observed_layers(model, names.keys(), 4)
    return layers, {names[key]: reason for key, reason in reasons.items()}


def product(layer: ObservedLayer, x: np.ndarray) -> np.ndarray:
    """(N, positions, K): the rows of an input times the weight."""
    call = layer.calls[0]
    samples, count = unfolded_shape(call, layer, x)
    rows = unfold(call, layer, x, np.arange(count))
    assert rows.shape == (samples, count, layer.columns)
    return rows @ unfold_weight(layer.weight(numpy_helper.to_array(layer.tensor))).T


@pytest.mark.parametrize(
    ("kernel", "size", "attributes"),
    [
        ((3, 3), (9, 8), {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
        ((3, 2), (9, 8), {"dilations": [2, 3], "pads": [0, 1, 0, 1]}),
        ((1, 1), (5, 6), {"strides": [2, 2]}),
        ((3, 4), (9, 8), {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
        ((2, 4), (9, 8), {"auto_pad": "SAME_LOWER"}),
        ((3, 3), (9, 8), {"auto_pad": "VALID"}),
        ((5,), (11,), {"pads": [2, 1]}),
        ((2, 3, 2), (4, 5, 6), {"pads": [0, 1, 0, 1, 0, 0]}),
    ],
)
def test_a_convolution_is_its_weight_times_its_unfolded_input(
    kernel: tuple[int, ...], size: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    weight, x = noise(5, 4, *kernel), noise(3, 4, *size)
    model = model_of([helper.make_node("Conv", ["x", "w"], ["y"], **attributes)], {"w": weight}, {"x": x.shape})
    (layer,), _ = layers_of(model)
    expected = open_session(model.SerializeToString()).run(None, {"x": x})[0]
    found = product(layer, x)
    assert found.shape[1] == np.prod(expected.shape[2:])
    assert np.moveaxis(found, 2, 1).reshape(expected.shape) == pytest.approx(expected, abs=1e-4)
    few = unfold(layer.calls[0], layer, x, np.array([1, 3]))
    assert np.array_equal(few, unfold(layer.calls[0], layer, x, np.arange(found.shape[1]))[:, [1, 3]])


@pytest.mark.parametrize(
    ("node", "weight", "x", "as_rows"),
    [
        (("MatMul", ["x", "w"], {}), (8, 5), (2, 3, 8), lambda y: y),
        (("MatMul", ["x", "w"], {}), (1, 8, 5), (2, 3, 8), lambda y: y),
        (("MatMul", ["x", "w"], {}), (8, 5), (8,), lambda y: y.reshape(1, 1, 5)),
        (("MatMul", ["w", "x"], {}), (5, 8), (2, 8, 3), lambda y: np.moveaxis(y, 1, 2)),
        (("Gemm", ["x", "w"], {}), (8, 5), (3, 8), lambda y: y[:, None]),
        (("Gemm", ["x", "w"], {"transB": 1}), (5, 8), (3, 8), lambda y: y[:, None]),
        (("Gemm", ["x", "w"], {"transA": 1, "transB": 1}), (5, 8), (8, 3), lambda y: y[:, None]),
        (("Gemm", ["w", "x"], {}), (5, 8), (8, 3), lambda y: y.T[:, None]),
        (("Gemm", ["w", "x"], {"transA": 1, "transB": 1}), (8, 5), (3, 8), lambda y: y.T[:, None]),
    ],
)
def test_a_product_is_its_weight_times_its_rows(
    node: tuple[str, list[str], dict[str, int]], weight: tuple[int, ...], x: tuple[int, ...], as_rows: Any
) -> None:
    w, value = noise(*weight), noise(*x)
    model = model_of([helper.make_node(node[0], node[1], ["y"], **node[2])], {"w": w}, {"x": x})
    (layer,), _ = layers_of(model)
    assert layer.shape == (5, 8)
    expected = as_rows(open_session(model.SerializeToString()).run(None, {"x": value})[0])
    assert product(layer, value) == pytest.approx(expected, abs=1e-4)


def test_a_weight_in_another_layout_comes_back_as_it_was() -> None:
    weight, x = noise(3, 3, 8, 6), noise(2, 8, 5, 5)
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[3, 2, 0, 1]),
        helper.make_node("Conv", ["x", "t"], ["y"]),
    ]
    model = model_of(nodes, {"w": weight}, {"x": x.shape})
    (layer,), _ = layers_of(model)
    assert np.array_equal(layer.weight(weight), weight.transpose(3, 2, 0, 1))
    assert np.array_equal(layer.stored(layer.weight(weight)), weight)
    expected = open_session(model.SerializeToString()).run(None, {"x": x})[0]
    assert np.moveaxis(product(layer, x), 2, 1).reshape(expected.shape) == pytest.approx(expected, abs=1e-4)


def test_positions_count_weights_in_the_order_of_their_use() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h"], group=4),
        helper.make_node("Conv", ["h", "b"], ["i"]),
        helper.make_node("Conv", ["i", "b"], ["j"]),
        helper.make_node("Conv", ["j", "c"], ["y"]),
    ]
    weights = {"a": noise(4, 1, 1, 1), "b": noise(4, 4, 1, 1), "c": noise(4, 4, 1, 1)}
    model = model_of(nodes, weights, {"x": (1, 4, 2, 2)})
    layers, _ = layers_of(model)
    assert [(layer.name, layer.position, len(layer.calls)) for layer in layers] == [
        ("a", 0, 1),
        ("b", 1, 2),
        ("c", 2, 1),
    ]


def branches() -> onnx.ModelProto:
    """An If in an If: h, in the outer branch, goes into a convolution in the inner one."""

    def info(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    inner = helper.make_graph([helper.make_node("Conv", ["h", "b"], ["p"])], "inner", [], [info("p")])
    inner_else = helper.make_graph([helper.make_node("Neg", ["h"], ["q"])], "inner_else", [], [info("q")])
    outer = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "a"], ["h"]),
            helper.make_node("If", ["second"], ["r"], then_branch=inner, else_branch=inner_else),
        ],
        "outer",
        [],
        [info("r")],
    )
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["s"])], "other", [], [info("s")])
    nodes = [helper.make_node("If", ["first"], ["y"], then_branch=outer, else_branch=other)]
    model = model_of(nodes, {"a": noise(4, 4, 1, 1), "b": noise(4, 4, 1, 1)}, {"x": (1, 4, 3, 3)})
    model.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("first", "second"))
    return model


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_inputs_in_branches_are_read_out_where_the_branch_runs(first: bool, second: bool) -> None:
    model = branches()
    layers, reasons = layers_of(model)
    assert not reasons
    calls = [layer.calls[0] for layer in layers]
    serialized, names = observed_graph(model, calls)
    x = noise(1, 4, 3, 3)
    session = open_session(serialized)
    values = session.run(None, {"x": x, "first": np.array(first), "second": np.array(second)})
    found = {"x": x, **dict(zip((o.name for o in session.get_outputs()), values, strict=True))}
    assert names[0] == "x", "known outside the branch"
    hidden = found[names[1]]
    if first:
        a = numpy_helper.to_array(layers[0].tensor)[..., 0, 0]
        assert hidden == pytest.approx(np.einsum("kc,nchw->nkhw", a, x), abs=1e-5)
    else:
        assert hidden.size == 0
    assert model == branches() or len(model.graph.output) == 1


def test_inputs_that_cannot_be_read_out_have_a_reason() -> None:
    body = helper.make_graph(
        [helper.make_node("Conv", ["state", "looped"], ["next"]), helper.make_node("Identity", ["go"], ["still"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    nodes = [
        helper.make_node("Loop", ["count", "", "x"], ["l"], body=body),
        helper.make_node("DequantizeLinear", ["bytes", "scale"], ["f"]),
        helper.make_node("Conv", ["l", "f"], ["m"]),
        helper.make_node("MatMul", ["m", "batch"], ["n"]),
        helper.make_node("MatMul", ["n", "two"], ["o"]),
        helper.make_node("MatMul", ["two", "o"], ["y"]),
    ]
    weights = {
        "count": np.array(2, np.int64),
        "looped": noise(4, 4, 1, 1),
        "bytes": RNG.integers(-9, 9, (4, 4, 1, 1)).astype(np.int8),
        "scale": np.array(0.1, np.float32),
        "batch": noise(4, 4, 4),
        "two": noise(4, 4),
    }
    layers, reasons = layers_of(model_of(nodes, weights, {"x": (1, 4, 4, 4)}))
    assert layers == ()
    assert reasons == {"looped": IN_LOOP, "bytes": QUANTIZED, "batch": COMPUTED_SHAPE, "two": TWO_LAYOUTS}
