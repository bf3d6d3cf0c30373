"""FP16 copies: zeros stay zero, overflows are named, and ONNX Runtime computes nearly the same with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from fp16_graphs import (
    FLOAT,
    HALF,
    Array,
    assert_close_in_ort,
    constant,
    model_of,
    node,
    noise,
    run,
    tensors_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.precision import convert_to_fp16, to_fp16


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3), elements=st.floats(-65504, 65504, width=32)))
def test_weights_are_rounded_to_half_and_zeros_are_positive(values: Array) -> None:
    # Small elements are harmless beside large ones.
    values = np.append(values.ravel(), np.float32(65504))
    half = tensors_of(to_fp16(model_of([node("Add", ["x", "w"])], {"w": values})))["w"]
    assert half.dtype == np.float16
    assert np.array_equal(half, values.astype(np.float16))
    assert np.all(half[values == 0] == 0)
    assert not np.signbit(half[half == 0]).any()


def test_minus_zero_and_what_underflows_become_plus_zero() -> None:
    values = np.array([-0.0, -1e-9, 1e-9, -1e-8, 0.0, -6e-8, 1], np.float32)
    half = tensors_of(to_fp16(model_of([node("Conv", ["x", "w"])], {"w": values})))["w"]
    assert np.array_equal(half, np.array([0, 0, 0, 0, 0, -6e-8, 1], np.float16))
    assert np.array_equal(np.signbit(half), [False, False, False, False, False, True, False])


@pytest.mark.parametrize("value", [65504.0, -65504.0])
def test_the_largest_half_fits(value: float) -> None:
    half = tensors_of(to_fp16(model_of([node("Add", ["x", "w"])], {"w": np.array([value], np.float32)})))["w"]
    assert half[0] == np.float16(value)


def test_every_weight_that_overflows_stays_fp32_and_is_named() -> None:
    nodes = [
        node("Add", ["x", "fine"], "a"),
        node("Sigmoid", ["a"], "a1"),
        node("Mul", ["a1", "first.weight"], "b"),
        node("Sigmoid", ["b"], "b1"),
        node("Mul", ["b1", "second.weight"], "c"),
        constant("k", np.array([1e6], np.float32)),
        node("Add", ["c", "k"]),
    ]
    tensors = {
        "fine": np.array([65504], np.float32),
        "first.weight": np.array([65505], np.float32),
        "second.weight": np.array([-7e4, 1, 1, 1], np.float32),
    }
    model = model_of(nodes, tensors)
    half = convert_to_fp16(model)
    stored = tensors_of(half.model)
    assert {name: str(stored[name].dtype) for name in tensors} == {
        "fine": "float16",
        "first.weight": "float32",
        "second.weight": "float32",
    }
    assert list(half.in_fp32) == ["b", "b1", "c", "y"]
    assert half.in_fp32["c"] == "Mul, reads second.weight: exceeds FP16 with 7e+04"
    x = np.random.default_rng(0).normal(size=(2, 8, 4, 4)).astype(np.float32)
    assert np.allclose(run(half.model, x)[0], run(model, x)[0], rtol=1e-2)


def test_the_model_given_stays_as_it_is() -> None:
    model = model_of([node("Conv", ["x", "w"])], {"w": noise(4, 8, 3, 3)})
    before = model.SerializeToString()
    to_fp16(model)
    assert model.SerializeToString() == before


def test_names_metadata_and_the_borders_types_stay() -> None:
    model = model_of(
        [helper.make_node("Conv", ["x", "w", "b"], ["y"], "stem")], {"w": noise(4, 8, 3, 3), "b": noise(4)}
    )
    entry = model.metadata_props.add()
    entry.key, entry.value = "maskplan", "{}"
    half = to_fp16(model)
    assert {t.name for t in half.graph.initializer} == {"w", "b"}
    assert [(v.name, v.type.tensor_type.elem_type) for v in half.graph.input] == [("x", FLOAT)]
    assert [(v.name, v.type.tensor_type.elem_type) for v in half.graph.output] == [("y", FLOAT)]
    assert [(p.key, p.value) for p in half.metadata_props] == [("maskplan", "{}")]
    (conv,) = [n for n in half.graph.node if n.op_type == "Conv"]
    assert (conv.name, list(conv.input)[1:]) == ("stem", ["w", "b"])
    assert_close_in_ort(model, half)


def test_a_network_computes_nearly_the_same_in_half() -> None:
    nodes = [
        node("Conv", ["x", "w1", "b1"], "c", pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], "n"),
        node("Relu", ["n"], "r"),
        node("MaxPool", ["r"], "p", kernel_shape=[2, 2]),
        node("GlobalAveragePool", ["p"], "g"),
        node("Flatten", ["g"], "f"),
        node("Gemm", ["f", "w2", "b2"], transB=1),
    ]
    ones = np.ones(16, np.float32)
    tensors = {
        "w1": noise(16, 8, 3, 3),
        "b1": noise(16),
        "gamma": ones,
        "beta": noise(16),
        "mean": noise(16),
        "var": ones,
        "w2": noise(5, 16),
        "b2": noise(5),
    }
    model = model_of(nodes, tensors)
    half = to_fp16(model)
    assert {t.data_type for t in half.graph.initializer} == {HALF}
    assert_close_in_ort(model, half)


def test_integer_tensors_and_inputs_are_left_alone() -> None:
    model = model_of(
        [node("Gather", ["x", "i"], "g", axis=1), node("Reshape", ["g", "shape"])],
        {"i": np.array([0, 3], np.int64), "shape": np.array([0, -1], np.int64)},
    )
    half = to_fp16(model)
    assert {t.data_type for t in half.graph.initializer} == {TensorProto.INT64}
    assert_close_in_ort(model, half)


@pytest.mark.parametrize("where", ["initializer", "constant node"])
def test_the_scales_of_resize_stay_fp32(where: str) -> None:
    # 1/3 is not a half: rounded, the output would have another size.
    scales = np.array([1, 1, 10 / 3, 10 / 3], np.float32)
    resize = node("Resize", ["x", "", "s"], mode="linear")
    if where == "initializer":
        model = model_of([resize], {"s": scales})
        half = to_fp16(model)
        assert tensors_of(half)["s"].dtype == np.float32
        assert np.array_equal(tensors_of(half)["s"], scales)
    else:
        model = model_of([constant("s", scales), resize])
        half = to_fp16(model)
    assert_close_in_ort(model, half)


def test_scales_that_are_put_together_in_the_graph_stay_fp32() -> None:
    """PyTorch's older exporter joins the scales of batch and channels with those of rows and columns."""
    model = model_of(
        [node("Concat", ["a", "b"], "s", axis=0), node("Resize", ["x", "", "s"], mode="linear")],
        {"a": np.ones(2, np.float32), "b": np.full(2, 2, np.float32)},
    )
    assert_close_in_ort(model, to_fp16(model))


def test_casts_to_float_become_casts_to_half() -> None:
    nodes = [
        node("Shape", ["x"], "shape", start=2, end=3),
        node("Cast", ["shape"], "height", to=FLOAT),
        node("Div", ["x", "height"], "d"),
        node("Greater", ["d", "zero"], "above"),
        node("Cast", ["above"], "gate", to=FLOAT),
        node("Mul", ["d", "gate"]),
    ]
    model = model_of(nodes, {"zero": np.array(0, np.float32)})
    assert_close_in_ort(model, to_fp16(model))


def test_constant_nodes_of_tensors_are_converted() -> None:
    nodes = [
        constant("k", noise(8, 1, 1)),
        constant("low", np.array(-0.5, np.float32)),
        constant("high", np.array(0.5, np.float32)),
        node("Mul", ["x", "k"], "m"),
        node("Clip", ["m", "low", "high"], "c"),
        node("ConstantOfShape", ["shape"], "twos", value=numpy_helper.from_array(np.array([2], np.float32))),
        node("Add", ["c", "twos"]),
    ]
    model = model_of(nodes, {"shape": np.array([8, 4, 4], np.int64)})
    assert_close_in_ort(model, to_fp16(model))


@pytest.mark.parametrize("attribute", [{"value_float": 0.5}, {"value_floats": [0.5, 0.25, 1.0, 2.0]}])
def test_constant_nodes_of_plain_numbers_are_converted(attribute: dict[str, Any]) -> None:
    model = model_of([helper.make_node("Constant", [], ["k"], **attribute), node("Mul", ["x", "k"])])
    assert_close_in_ort(model, to_fp16(model))


def test_branches_are_converted_with_the_graph() -> None:
    """One branch has its own weight, the other uses an outer one and the graph's input."""

    def branch(name: str, weight: str, own: dict[str, Array]) -> onnx.GraphProto:
        return helper.make_graph(
            [node("Conv", ["x", weight], f"{name}_out")],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_out", FLOAT, None)],
            [numpy_helper.from_array(value, key) for key, value in own.items()],
        )

    for flag in (True, False):
        nodes = [
            helper.make_node(
                "If",
                ["flag"],
                ["y"],
                then_branch=branch("then", "outer", {}),
                else_branch=branch("else", "own", {"own": noise(4, 8, 1, 1)}),
            )
        ]
        model = model_of(nodes, {"outer": -noise(4, 8, 1, 1), "flag": np.array(flag)})
        assert_close_in_ort(model, to_fp16(model))


def test_an_output_that_the_graph_also_uses_is_still_an_output() -> None:
    nodes = [node("Mul", ["x", "k"], "y"), node("Relu", ["y"], "r"), node("Add", ["r", "x"], "z")]
    model = model_of(nodes, {"k": noise(8, 1, 1)}, ["y", "z"])
    assert_close_in_ort(model, to_fp16(model))


def test_infinity_fits_into_half() -> None:
    model = model_of([node("Max", ["x", "k"])], {"k": np.array(-np.inf, np.float32)})
    assert_close_in_ort(model, to_fp16(model))


def test_an_operator_without_a_half_precision_form_stays_fp32() -> None:
    nodes = [
        helper.make_node("Range", ["start", "stop", "step"], ["r"], "count"),
        node("Mul", ["x", "r"]),
    ]
    tensors = {name: np.array(value, np.float32) for name, value in (("start", 0), ("stop", 4), ("step", 1))}
    model = model_of(nodes, tensors)
    half = convert_to_fp16(model)
    assert half.in_fp32 == {"count": "Range, ONNX does not define the operator for FP16"}
    assert_close_in_ort(model, half.model)
