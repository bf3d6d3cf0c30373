"""What FP16 cannot hold is found by measured ranges, with a margin, and by the scales of Q/DQ."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.half_range import MAX_FP16, fp16_overflows, outside_fp16, unrepresentable_scales


def chain(*nodes: onnx.NodeProto, **tensors: object) -> onnx.ModelProto:
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    return helper.make_model(helper.make_graph(nodes, "test", [x], [y], stored))


def step(op: str, inputs: list[str], output: str) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], output)


@pytest.mark.parametrize(
    ("largest", "margin", "over"),
    [
        (MAX_FP16, 1.0, False),
        (math.nextafter(MAX_FP16, math.inf), 1.0, True),
        (MAX_FP16 / 2, 2.0, False),
        (MAX_FP16 / 2 + 1, 2.0, True),
        (MAX_FP16 / 4, 2.0, False),
        (math.inf, 1.0, True),
        (math.nan, 1.0, True),
    ],
)
def test_a_tensor_is_named_when_it_exceeds_half_with_the_margin(largest: float, margin: float, over: bool) -> None:
    model = chain(step("Exp", ["x"], "y"))
    assert list(fp16_overflows(model, {"y": largest}, margin)) == (["y"] if over else [])


@pytest.mark.parametrize(
    ("largest", "outside"), [(0.0, False), (1e-9, True), (6.0e-5, True), (6.2e-5, False), (4e4, True)]
)
def test_activations_that_vanish_or_overflow_are_outside(largest: float, outside: bool) -> None:
    model = chain(step("Exp", ["x"], "y"))
    assert list(outside_fp16(model, {"y": largest, "x": 1e-9, "of another model": 1e-9})) == (["y"] if outside else [])


def test_the_default_margin_is_two() -> None:
    model = chain(step("Exp", ["x"], "y"))
    assert fp16_overflows(model, {"y": 32753.0}) == {"y": 32753.0}
    assert fp16_overflows(model, {"y": 32752.0}) == {}


def test_tensors_are_named_in_the_order_of_the_graph_and_others_passed_over() -> None:
    model = chain(step("Exp", ["x"], "a"), step("Exp", ["a"], "b"), step("Exp", ["b"], "y"))
    ranges = {"y": 1e6, "of another model": 1e9, "a": 1e5, "b": 1.0, "x": 1e7}
    assert list(fp16_overflows(model, ranges).items()) == [("x", 1e7), ("a", 1e5), ("y", 1e6)]


def test_an_unmeasured_tensor_has_the_range_of_its_source() -> None:
    model = chain(
        step("Exp", ["x"], "a"), step("Relu", ["a"], "r"), step("ReduceMean", ["r"], "f"), step("Exp", ["f"], "y")
    )
    assert fp16_overflows(model, {"a": 1e5}) == {"a": 1e5, "r": 1e5, "f": 1e5}
    assert fp16_overflows(model, {"a": 1e5, "r": 10.0}) == {"a": 1e5}


@pytest.mark.parametrize(
    ("scale", "kind", "unfit"),
    [
        (0.01, np.int8, False),
        (2**-14, np.int8, False),
        (2**-15, np.int8, True),
        (0.0, np.int8, True),
        (float("nan"), np.int8, True),
        (500.0, np.int8, False),
        (513.0, np.int8, True),
        (400.0, np.uint8, True),
        (200.0, np.uint8, False),
        (2.0, np.int16, True),
        (1.9, np.int16, False),
    ],
)
def test_a_scale_fits_if_it_and_the_largest_float_of_its_integers_fit(scale: float, kind: type, unfit: bool) -> None:
    model = chain(
        step("QuantizeLinear", ["x", "s", "z"], "q"),
        step("DequantizeLinear", ["q", "s", "z"], "y"),
        s=np.float32(scale),
        z=np.zeros((), kind),
    )
    found = unrepresentable_scales(model.graph)
    assert len(found) == (2 if unfit else 0)
    assert all(text.startswith(("q (s ", "y (s ")) for text in found)


def test_only_an_overflow_keeps_the_tensor_before_it_in_fp32() -> None:
    for scale, before in ((1e-6, False), (1e4, True)):
        nodes = step("QuantizeLinear", ["x", "s", "z"], "q"), step("DequantizeLinear", ["q", "s", "z"], "y")
        model = chain(*nodes, s=np.float32(scale), z=np.int8(0))
        kept = {name for names in unrepresentable_scales(model.graph).values() for name in names}
        assert kept == {"q", "y", *(["x"] if before else [])}


def test_without_a_zero_point_the_integers_are_unsigned_and_a_far_one_reaches_farther() -> None:
    plain = chain(step("QuantizeLinear", ["x", "s"], "q"), s=np.float32(300))
    assert unrepresentable_scales(plain.graph)
    for zero, unfit in ((0, False), (-128, True)):
        model = chain(step("QuantizeLinear", ["x", "s", "z"], "q"), s=np.float32(300), z=np.int8(zero))
        assert bool(unrepresentable_scales(model.graph)) == unfit


def test_scales_of_constant_nodes_are_found_and_computed_or_half_ones_are_left() -> None:
    scale = helper.make_node("Constant", [], ["s"], value=numpy_helper.from_array(np.float32(1e-7)))
    assert unrepresentable_scales(chain(scale, step("QuantizeLinear", ["x", "s"], "q")).graph)
    computed = chain(step("ReduceMax", ["x"], "s"), step("QuantizeLinear", ["x", "s"], "q"))
    assert not unrepresentable_scales(computed.graph)
    half = chain(step("QuantizeLinear", ["x", "s"], "q"), s=np.float16(1e-7))
    assert not unrepresentable_scales(half.graph)
