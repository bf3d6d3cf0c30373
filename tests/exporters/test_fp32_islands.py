"""Parts that stay FP32 in an FP16 graph: layers with scales that FP16 cannot represent, and activations that overflow."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from fp16_graphs import (
    FLOAT,
    HALF,
    Array,
    assert_close_in_ort,
    assert_valid,
    constant,
    exact,
    model_of,
    node,
    noise,
    run,
    tensors_of,
)
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.half_range import fp16_overflows
from maskplan.exporters.precision import to_fp16
from maskplan.pipeline.core.errors import InputError


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
def test_an_opset_without_fp16_scales_is_refused_with_the_one_needed(opset: int) -> None:
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


def test_tensors_kept_in_fp32_may_be_inputs_outputs_and_neighbors() -> None:
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


def test_unknown_names_to_keep_in_fp32_are_refused() -> None:
    with pytest.raises(InputError, match="no such tensors") as caught:
        to_fp16(model_of([node("Relu", ["x"])]), ["y", "layer9", "layer8"])
    assert "layer9, layer8" in str(caught.value)


def test_a_weight_beyond_half_passes_where_its_layer_is_kept() -> None:
    model = model_of(
        [node("Mul", ["x", "w"], "a"), node("Mul", ["a", "v"])], {"w": np.float32([1e5]), "v": np.float32([1e-5])}
    )
    half = to_fp16(model)
    assert tensors_of(half)["w"].dtype == np.float32
    assert_close_in_ort(model, half)
    assert_close_in_ort(model, to_fp16(model, ["w"]))
