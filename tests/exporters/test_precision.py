"""FP16 copies: the zeros stay, what does not fit is named, and ONNX Runtime computes nearly the same with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from maskplan.exporters.half_range import fp16_overflows
from maskplan.exporters.precision import to_fp16
from maskplan.pipeline.core.errors import InputError

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


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3), elements=st.floats(-65504, 65504, width=32)))
def test_weights_are_rounded_to_half_and_zeros_are_positive(values: Array) -> None:
    half = tensors_of(to_fp16(model_of([node("Add", ["x", "w"])], {"w": values})))["w"]
    assert half.dtype == np.float16
    assert np.array_equal(half, values.astype(np.float16))
    assert np.all(half[values == 0] == 0)
    assert not np.signbit(half[half == 0]).any()


def test_minus_zero_and_what_underflows_become_plus_zero() -> None:
    values = np.array([-0.0, -1e-9, 1e-9, -1e-8, 0.0, -6e-8], np.float32)
    half = tensors_of(to_fp16(model_of([node("Conv", ["x", "w"])], {"w": values})))["w"]
    assert np.array_equal(half, np.array([0, 0, 0, 0, 0, -6e-8], np.float16))
    assert np.array_equal(np.signbit(half), [False, False, False, False, False, True])


@pytest.mark.parametrize("value", [65504.0, -65504.0])
def test_the_largest_half_fits(value: float) -> None:
    half = tensors_of(to_fp16(model_of([node("Add", ["x", "w"])], {"w": np.array([value], np.float32)})))["w"]
    assert half[0] == np.float16(value)


def test_every_weight_that_overflows_is_named() -> None:
    nodes = [
        node("Add", ["x", "fine"], "a"),
        node("Add", ["a", "first.weight"], "b"),
        node("Add", ["b", "second.weight"], "c"),
        constant("k", np.array([1e6], np.float32)),
        node("Add", ["c", "k"]),
    ]
    tensors = {
        "fine": np.array([65504], np.float32),
        "first.weight": np.array([65505], np.float32),
        "second.weight": np.array([-7e4, 1], np.float32),
    }
    with pytest.raises(InputError, match="exceed the range of FP16") as caught:
        to_fp16(model_of(nodes, tensors))
    text = str(caught.value)
    for name in ("first.weight", "second.weight", "k ("):
        assert name in text
    assert "fine" not in text
    assert "7e+04" in text


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


def test_an_operator_without_a_half_precision_form_is_named() -> None:
    nodes = [
        helper.make_node("Range", ["start", "stop", "step"], ["r"], "count"),
        node("Mul", ["x", "r"]),
    ]
    tensors = {name: np.array(value, np.float32) for name, value in (("start", 0), ("stop", 4), ("step", 1))}
    with pytest.raises(InputError, match="not defined for FP16") as caught:
        to_fp16(model_of(nodes, tensors))
    assert "count (Range)" in str(caught.value)


def qdq(x_scale: float = 0.02, w_scale: Array | None = None, opset: int = 20) -> onnx.ModelProto:
    """Two INT8 convolutions with a residual add and a pooled head in floating point, as calibration makes them."""
    rng = np.random.default_rng(1)

    def pair(value: str, name: str) -> list[onnx.NodeProto]:
        rest = [f"{name}_scale", f"{name}_zero"]
        return [
            helper.make_node("QuantizeLinear", [value, *rest], [f"{name}_q"], f"{name}_quantize"),
            helper.make_node("DequantizeLinear", [f"{name}_q", *rest], [f"{name}_dq"], f"{name}_dequantize"),
        ]

    def weight(name: str) -> onnx.NodeProto:
        inputs = [name, f"{name}_scale", f"{name}_zero"]
        return helper.make_node("DequantizeLinear", inputs, [f"{name}_dq"], f"{name}_dequantize", axis=0)

    nodes = [
        *pair("x", "x"),
        weight("w1"),
        helper.make_node("Conv", ["x_dq", "w1_dq", "b1"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], "r1"),
        *pair("r1", "r1"),
        weight("w2"),
        helper.make_node("Conv", ["r1_dq", "w2_dq"], ["c2"], "conv2", pads=[1, 1, 1, 1]),
        node("Add", ["c2", "x_dq"], "sum"),
        node("GlobalAveragePool", ["sum"], "y"),
    ]
    scales = np.linspace(0.004, 0.01, 8).astype(np.float32)
    tensors: dict[str, Array] = {
        "x_scale": np.array(x_scale, np.float32),
        "x_zero": np.array(0, np.int8),
        "r1_scale": np.array(0.03, np.float32),
        "r1_zero": np.array(0, np.int8),
        "b1": noise(8),
    }
    for name, own in (("w1", scales if w_scale is None else w_scale), ("w2", scales)):
        integers = rng.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8)
        integers[:, ::2] = 0
        tensors |= {name: integers, f"{name}_scale": own, f"{name}_zero": np.zeros(8, np.int8)}
    model = model_of(nodes, tensors)
    model.opset_import[0].version = opset
    return model


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


@pytest.mark.parametrize("opset", [19, 20, 21, 23])
def test_outside_its_integers_a_quantized_graph_runs_in_half(opset: int) -> None:
    model = qdq(opset=opset)
    half = to_fp16(model)
    types = assert_valid(half)
    assert types["x"] == types["y"] == FLOAT
    float_values = {name for name, kind in types.items() if kind == FLOAT}
    assert float_values == {"x", "y"}
    assert {types[name] for name in ("x_dq", "w1_dq", "c1", "r1_dq", "c2", "sum")} == {HALF}
    assert {types[name] for name in ("x_q", "r1_q")} == {TensorProto.INT8}
    before, after = tensors_of(model), tensors_of(half)
    assert before.keys() == after.keys()
    for name, value in before.items():
        if value.dtype == np.int8:
            assert after[name].dtype == np.int8
            assert np.array_equal(after[name], value)
        else:
            assert np.array_equal(after[name], value.astype(np.float16))
            assert after[name].dtype == np.float16
    assert_close_in_ort(model, half)


def test_a_quantized_graph_in_half_computes_nearly_the_same_where_every_step_is_rounded() -> None:
    model = qdq()
    x = np.random.default_rng(5).normal(size=(2, 8, 4, 4)).astype(np.float32)
    (expected,), (found,) = run(model, x), exact(to_fp16(model), x)
    assert np.allclose(found, expected, atol=3e-2 * np.abs(expected).max())


@pytest.mark.parametrize("opset", [13, 18])
def test_an_opset_without_half_scales_is_told_with_the_one_needed(opset: int) -> None:
    with pytest.raises(InputError, match=f"opset {opset}; FP16 scales need 19"):
        to_fp16(qdq(opset=opset))
    to_fp16(model_of([node("Relu", ["x"])]))


def scales_with(value: float) -> Array:
    return np.array([*([0.01] * 7), value], np.float32)


@pytest.mark.parametrize("value", [0.0, 1e-9, 3e-5, 7e4])
def test_a_weight_scale_that_half_cannot_hold_leaves_its_layer_in_fp32_and_int8(
    value: float, caplog: pytest.LogCaptureFixture
) -> None:
    model = qdq(w_scale=scales_with(value))
    half = to_fp16(model)
    assert "w1_scale" in caplog.text
    assert "w2_scale" not in caplog.text
    types, values = assert_valid(half), tensors_of(half)
    assert np.array_equal(values["w1_scale"], scales_with(value))
    assert values["w1_scale"].dtype == values["b1"].dtype == np.float32
    assert values["w2_scale"].dtype == np.float16
    assert np.array_equal(values["w1"], tensors_of(model)["w1"])
    makers = {name: n for n in half.graph.node for name in n.output}
    (conv,) = [n for n in half.graph.node if n.name == "conv1"]
    # It takes integers and gives integers after the Relu, without a cast between them.
    assert [makers[name].op_type for name in conv.input[:2]] == ["DequantizeLinear"] * 2
    assert {types[name] for name in (*conv.input[:2], "c1", "r1")} == {FLOAT}
    assert "Cast" not in {n.op_type for n in half.graph.node for name in ("c1", "r1") if name in n.input}
    assert types["c2"] == HALF
    # ONNX Runtime's optimizer makes integers of the bias, which with such a scale are too large for it.
    x = np.random.default_rng(3).normal(size=(2, 8, 4, 4)).astype(np.float32)
    (expected,) = exact(model, x)
    for found in (*exact(half, x), *run(half, x, optimized=False)):
        assert np.allclose(found, expected, atol=1e-2 * np.abs(expected).max())


def test_an_activation_scale_that_half_cannot_hold_leaves_what_reads_it_in_fp32(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = qdq(x_scale=2e-5)
    half = to_fp16(model)
    types = assert_valid(half)
    assert "x_scale has 2e-05" in caplog.text
    assert types["c1"] == types["sum"] == FLOAT
    assert types["c2"] == HALF
    assert_close_in_ort(model, half)


def test_scales_that_half_holds_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    to_fp16(qdq(w_scale=scales_with(2**-14)))
    assert not caplog.records


def overflowing(quantized: bool = False) -> onnx.ModelProto:
    """The first layer's weights are too large for its output to fit FP16, the second's as much smaller."""
    up, down = noise(8, 8, 1, 1, scale=2e4), noise(8, 8, 1, 1, scale=2e-5)
    middle = "r"
    tensors: dict[str, Array] = {"up.weight": up, "down.weight": down, "b": noise(8)}
    nodes = [
        helper.make_node("Conv", ["x", "up.weight"], ["u"], "up"),
        helper.make_node("Relu", ["u"], ["r"], "rectify"),
    ]
    if quantized:
        middle = "r_dq"
        tensors |= {"s": np.array(2e5 / 127, np.float32), "z": np.array(0, np.int8)}
        nodes += [
            helper.make_node("QuantizeLinear", ["r", "s", "z"], ["r_q"], "q"),
            helper.make_node("DequantizeLinear", ["r_q", "s", "z"], ["r_dq"], "dq"),
        ]
    nodes += [
        helper.make_node("Conv", [middle, "down.weight", "b"], ["d"], "down"),
        helper.make_node("Relu", ["d"], ["e"], "after"),
        helper.make_node("Conv", ["e", "head.weight"], ["y"], "head"),
    ]
    return model_of(nodes, {**tensors, "head.weight": noise(4, 8, 1, 1)})


def ranges_of(model: onnx.ModelProto, x: Array) -> dict[str, float]:
    """The largest magnitudes that ONNX Runtime finds in FP32."""
    probe = onnx.ModelProto.FromString(model.SerializeToString())
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for n in probe.graph.node for name in n.output)
    return {
        output.name: float(np.abs(value).max()) for output, value in zip(probe.graph.output, run(probe, x), strict=True)
    }


def test_what_overflows_is_infinite_in_plain_half_and_right_where_it_is_kept() -> None:
    model = overflowing()
    x = np.random.default_rng(2).normal(size=(2, 8, 4, 4)).astype(np.float32)
    (expected,) = run(model, x)
    assert not np.isfinite(exact(to_fp16(model), x)[0]).all()
    beyond = fp16_overflows(model, ranges_of(model, x))
    assert list(beyond) == ["u", "r"]
    half = to_fp16(model, beyond)
    types = assert_valid(half)
    assert {types[name] for name in ("u", "r", "d", "e")} == {FLOAT}
    assert types["e_fp16"] == HALF
    for found in (*exact(half, x), *run(half, x)):
        assert found.dtype == np.float32
        assert np.allclose(found, expected, atol=1e-2 * np.abs(expected).max())
    values = tensors_of(half)
    assert values["up.weight"].dtype == values["down.weight"].dtype == values["b"].dtype == np.float32
    assert values["head.weight"].dtype == np.float16
    # The input goes into the layer as it is; nothing rounds it on the way.
    (up,) = [n for n in half.graph.node if n.name == "up"]
    assert up.input[0] == "x"


def test_what_overflows_before_it_is_quantized_is_kept_by_its_scale_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = overflowing(quantized=True)
    x = np.random.default_rng(2).normal(size=(2, 8, 4, 4)).astype(np.float32)
    (expected,) = run(model, x)
    half = to_fp16(model)
    assert "s reaches 2.016e+05" in caplog.text
    types = assert_valid(half)
    assert {types[name] for name in ("u", "r", "r_dq", "d", "e")} == {FLOAT}
    assert types["e_fp16"] == HALF
    for found in (*exact(half, x), *run(half, x)):
        assert np.allclose(found, expected, atol=1e-2 * np.abs(expected).max())


def test_constants_of_both_parts_exist_twice_and_only_the_named_part_is_exact() -> None:
    third = np.full((8, 1, 1), 1 / 3, np.float32)
    nodes = [
        constant("k", third),
        node("Mul", ["x", "w"], "a"),
        node("Mul", ["a", "k"], "b"),
        node("Sigmoid", ["b"], "c"),
        node("Mul", ["c", "w"], "d"),
        node("Mul", ["d", "k"]),
    ]
    model = model_of(nodes, {"w": third})
    half = to_fp16(model, ["a"])
    types, values = assert_valid(half), tensors_of(half)
    assert (types["a"], types["b"], types["c"]) == (FLOAT, FLOAT, HALF)
    assert values["w"].dtype == np.float16
    assert np.array_equal(values["w_fp32"], third)
    assert (types["k"], types["k_fp32"]) == (HALF, FLOAT)
    assert_close_in_ort(model, half)


def test_kept_tensors_may_be_inputs_and_outputs_and_lie_beside_each_other() -> None:
    nodes = [
        node("Mul", ["x", "k"], "a"),
        node("Relu", ["a"], "y"),
        node("Mul", ["y", "k"], "b"),
        node("Shape", ["b"], "shape"),
        node("Sigmoid", ["b"], "c"),
        node("Reshape", ["c", "shape"], "z"),
    ]
    model = model_of(nodes, {"k": noise(8, 1, 1)}, ["y", "z"])
    for kept in (["x"], ["y"], ["z"], ["a", "b"], ["x", "z"], ["x", "a", "y", "b", "c", "z"], ["shape"]):
        half = to_fp16(model, kept)
        types = assert_valid(half)
        assert all(types[name] == FLOAT for name in kept if name != "shape")
        assert_close_in_ort(model, half)
    everything = to_fp16(model, ["x", "a", "y", "b", "c", "z"])
    assert not [n for n in everything.graph.node if n.op_type == "Cast"]


def test_a_branch_that_reads_a_kept_tensor_stays_fp32_as_a_whole() -> None:
    def branch(name: str, weight: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"{name}_out", FLOAT, None)
        own = numpy_helper.from_array(noise(8, 8, 1, 1), f"{name}_own")
        return helper.make_graph([node("Conv", ["a", weight], f"{name}_out")], name, [], [output], [own])

    choose = {"then_branch": branch("then", "outer"), "else_branch": branch("else", "else_own")}
    for flag in (True, False):
        nodes = [
            node("Mul", ["x", "k"], "a"),
            helper.make_node("If", ["flag"], ["i"], **choose),
            node("Conv", ["i", "outer"]),
        ]
        tensors = {"k": noise(8, 1, 1), "outer": noise(8, 8, 1, 1), "flag": np.array(flag)}
        model = model_of(nodes, tensors)
        half = to_fp16(model, ["a"])
        assert_valid(half)
        assert {name: value.dtype for name, value in tensors_of(half).items() if name != "flag"} == {
            "k": np.float32,
            "outer": np.float16,
            "outer_fp32": np.float32,
        }
        assert_close_in_ort(model, half)


def test_keeping_names_that_the_graph_has_not_is_refused() -> None:
    with pytest.raises(InputError, match="no such tensors") as caught:
        to_fp16(model_of([node("Relu", ["x"])]), ["y", "layer9", "layer8"])
    assert "layer9, layer8" in str(caught.value)


def test_a_weight_beyond_half_passes_where_its_layer_is_kept() -> None:
    model = model_of(
        [node("Mul", ["x", "w"], "a"), node("Mul", ["a", "v"])], {"w": np.float32([1e5]), "v": np.float32([1e-5])}
    )
    with pytest.raises(InputError, match="w "):
        to_fp16(model)
    assert_close_in_ort(model, to_fp16(model, ["w"]))
