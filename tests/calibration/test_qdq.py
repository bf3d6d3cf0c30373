"""Q/DQ graphs of five families: TensorRT's rules, 2:4 on the integers, and arithmetic to the last integer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits

from maskplan.calibration.placement import Placement, PlaceOptions, place
from maskplan.calibration.qdq import insert_qdq
from maskplan.exporters.conformance import check_2to4
from maskplan.exporters.metadata import precision_of, read_provenance
from maskplan.exporters.onnx_export import trace
from maskplan.pipeline.core.choices import CONFORMING, FAIL, PASS, VIOLATING
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint

Array = npt.NDArray[Any]
Run = Callable[..., dict[str, Array]]
both_ways = pytest.mark.parametrize("quantize_outputs", [False, True], ids=["inputs", "outputs"])
FUSED_ACTIVATIONS = ("Relu", "HardSwish", "HardSigmoid")


class Read:
    """A graph by who makes and who reads a tensor; the tests' own, apart from the code's."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.made = {name: node for node in self.nodes for name in node.output}
        self.stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}

    def ops(self, *ops: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if node.op_type in ops]

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes for name in node.input if name == tensor]

    def dequantized(self, tensor: str) -> bool:
        return tensor in self.made and self.made[tensor].op_type == "DequantizeLinear"

    def scale(self, dequantized: str) -> Array:
        return self.stored[self.made[dequantized].input[1]]


def quantized(family: Any, quantize_outputs: bool = False, exclude: tuple[str, ...] = ()) -> onnx.ModelProto:
    placement = place(family.model, PlaceOptions(exclude, quantize_outputs))
    return insert_qdq(family.model, placement, family.amax)


@both_ways
def test_layers_read_int8_and_biases_are_float(family: Any, quantize_outputs: bool) -> None:
    graph = Read(quantized(family, quantize_outputs))
    layers = graph.ops("Conv", "Gemm", "MatMul")
    assert len(layers) > 10
    for layer in layers:
        data, weight = graph.made[layer.input[0]], graph.made[layer.input[1]]
        assert data.op_type == weight.op_type == "DequantizeLinear"
        assert graph.made[data.input[0]].op_type == "QuantizeLinear"
        integers, scales, zeros = (graph.stored[name] for name in weight.input)
        assert integers.dtype == np.int8
        (axis,) = (a.i for a in weight.attribute if a.name == "axis")
        # One output channel a bias.
        channels = len(graph.stored[layer.input[2]]) if len(layer.input) > 2 else integers.shape[axis]
        assert scales.shape == zeros.shape == (channels,) == (integers.shape[axis],)
        if len(layer.input) > 2:
            assert graph.stored[layer.input[2]].dtype == np.float32


@both_ways
def test_no_zero_point_is_asymmetric_and_scales_are_scalars(family: Any, quantize_outputs: bool) -> None:
    graph = Read(quantized(family, quantize_outputs))
    for node in graph.ops("QuantizeLinear", "DequantizeLinear"):
        scale, zero = graph.stored[node.input[1]], graph.stored[node.input[2]]
        assert (zero.dtype, zero.any()) == (np.int8, False)
        assert scale.dtype == np.float32
        assert (np.finfo(np.float16).smallest_normal <= scale).all()
        if node.op_type == "QuantizeLinear":
            assert scale.shape == ()


@both_ways
def test_nothing_stands_between_a_layer_and_its_activation(family: Any, quantize_outputs: bool) -> None:
    before, after = Read(family.model), Read(quantized(family, quantize_outputs))
    seen = 0
    for node in before.ops("Conv", "Gemm", "Add"):
        readers = before.readers(node.output[0])
        if len(readers) == 1 and readers[0].op_type in FUSED_ACTIVATIONS:
            assert [r.name for r in after.readers(node.output[0])] == [readers[0].name]
            seen += 1
    assert seen >= 9


# Residual additions; of these, with a convolution on both branches.
ADDITIONS = {"resnet18": (8, 3), "mobilenet_v3_small": (6, 0), "vgg11_bn": (0, 0)}


@both_ways
def test_of_a_residual_addition_the_skip_alone_is_quantized(family: Any, quantize_outputs: bool) -> None:
    before, after = Read(family.model), Read(quantized(family, quantize_outputs))
    seen = twice = 0
    sums = {node.name: node for node in after.ops("Add")}
    for node in before.ops("Add"):
        direct = [before.made[x].op_type == "Conv" and len(before.readers(x)) == 1 for x in node.input]
        assert any(direct)
        pairs = [after.dequantized(x) for x in sums[node.name].input]
        assert sorted(pairs) == [False, True]
        # The one in float is a convolution's own output.
        assert direct[pairs.index(False)]
        seen, twice = seen + 1, twice + all(direct)
    assert (seen, twice) == ADDITIONS.get(family.name, (0, 0))


# Concatenations whose inputs are quantized, of how many.
JOINED = {
    ("shufflenet_v2_x0_5", False): (16, 16),
    ("shufflenet_v2_x0_5", True): (16, 16),
    ("densenet121", False): (0, 58),
    ("densenet121", True): (58, 58),
}


@both_ways
def test_concatenations_have_inputs_of_one_scale(family: Any, quantize_outputs: bool) -> None:
    graph = Read(quantized(family, quantize_outputs))
    joined = 0
    for node in graph.ops("Concat"):
        pairs = [graph.dequantized(x) for x in node.input]
        assert all(pairs) or not any(pairs)
        if all(pairs):
            assert len({float(graph.scale(x)) for x in node.input}) == 1
            joined += 1
    assert (joined, len(graph.ops("Concat"))) == JOINED.get((family.name, quantize_outputs), (0, 0))


# Max pools between quantized tensors; the last one of VGG and the one of DenseNet feed averages and BatchNorm.
POOLS = {"resnet18": 1, "vgg11_bn": 4, "shufflenet_v2_x0_5": 1}


def test_max_pools_have_one_scale_before_and_after(family: Any) -> None:
    graph = Read(quantized(family))
    pooled = 0
    for node in graph.ops("MaxPool"):
        readers = graph.readers(node.output[0])
        if graph.dequantized(node.input[0]):
            assert [r.op_type for r in readers] == ["QuantizeLinear"]
            assert graph.stored[readers[0].input[1]] == graph.scale(node.input[0])
            pooled += 1
    assert pooled == POOLS.get(family.name, 0)


@both_ways
def test_each_tensor_is_quantized_once_and_each_reader_has_its_own_values(family: Any, quantize_outputs: bool) -> None:
    graph = Read(quantized(family, quantize_outputs))
    assert set(Counter(node.input[0] for node in graph.ops("QuantizeLinear")).values()) == {1}
    for node in graph.ops("DequantizeLinear"):
        assert len(graph.readers(node.output[0])) == 1


def test_int8_outputs_leave_no_float_reader_behind_a_layer(families: Callable[[str], Any]) -> None:
    family = families("mobilenet_v3_small")
    before, after = Read(family.model), Read(quantized(family, quantize_outputs=True))
    swishes = [node.output[0] for node in before.ops("HardSwish")]
    assert len(swishes) == 19
    for tensor in swishes:
        # Also for the average and the product of squeeze and excitation.
        assert [r.op_type for r in after.readers(tensor)] == ["QuantizeLinear"]
    by_default = Read(quantized(family))
    assert any(r.op_type != "QuantizeLinear" for t in swishes for r in by_default.readers(t))
    assert after.made["logits"].op_type == "Gemm"


@both_ways
def test_checker_and_onnx_runtime_accept_it_and_outputs_stay_close(
    family: Any, quantize_outputs: bool, run: Run
) -> None:
    model = quantized(family, quantize_outputs)
    onnx.checker.check_model(model, full_check=True)
    expected = run(family.model, family.images)["logits"]
    for optimize in (False, True):
        found = run(model, family.images, optimize=optimize)["logits"]
        # Random weights magnify noise: half a percent on the images moves the logits of ShuffleNetV2 by 12 percent.
        assert 0.8 < (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected) < 1 - 1e-7


@both_ways
def test_a_trained_network_keeps_its_answers(quantize_outputs: bool, run: Run) -> None:
    module, made = open_checkpoint(ModelOptions("digits_resnet"))
    model = trace(module, made)
    how = made.preprocessing
    images = (load_digits().images[:, None] / 16 - how.mean[0]) / how.std[0]
    shown, judged = np.split(images.astype(np.float32)[:600], 2)
    placement = place(model, PlaceOptions(quantize_outputs=quantize_outputs))
    ranges = run(model, shown, [a.tensor for a in placement.activations if a.tensor != "input"])
    amax = {name: float(np.abs(values).max()) for name, values in ranges.items()}
    result = insert_qdq(model, placement, {**amax, "input": float(np.abs(shown).max())})
    expected, found = (run(m, judged)["logits"] for m in (model, result))
    assert 0 < np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.99


@both_ways
def test_all_else_of_the_model_stays(family: Any, quantize_outputs: bool) -> None:
    untouched = family.model.SerializeToString(deterministic=True)
    model = quantized(family, quantize_outputs)
    again = quantized(family, quantize_outputs)
    assert model.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)
    assert family.model.SerializeToString(deterministic=True) == untouched
    assert read_provenance(model, "it") == read_provenance(family.model, "it")
    assert (model.opset_import, model.ir_version) == (family.model.opset_import, family.model.ir_version)
    assert (model.graph.input, model.graph.output) == (family.model.graph.input, family.model.graph.output)
    kept = [n for n in model.graph.node if n.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    assert [(n.name, n.op_type, n.output, n.attribute) for n in kept] == [
        (n.name, n.op_type, n.output, n.attribute) for n in family.model.graph.node
    ]
    before, after = Read(family.model).stored, Read(model).stored
    assert set(before) <= set(after)
    names = [n.name for n in model.graph.node]
    assert len(names) == len(set(names))


def test_integers_of_masked_layers_are_2to4_and_pruned_positions_zero(family: Any) -> None:
    model = quantized(family)
    report = check_2to4(model)
    assert (report.verdict, report.violating) == (PASS, 0)
    masked = set(read_provenance(model, "it").masked)
    assert {w.name for w in report.weights if w.verdict == CONFORMING} == masked
    assert len(masked) >= 7
    before, after = Read(family.model).stored, Read(model).stored
    for weight in report.weights:
        if weight.name in masked:
            assert weight.dtype == "int8"
            assert not after[weight.name][before[weight.name] == 0].any()
            assert 0.5 <= np.mean(after[weight.name] == 0) < 0.75
            assert after[f"{weight.name}_zero_point"].tolist() == [0] * weight.shape[0]


def test_one_integer_of_a_pruned_position_is_caught(families: Callable[[str], Any]) -> None:
    model = quantized(families("resnet18"))
    name = "layer2.0.conv1.weight"
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    integers = numpy_helper.to_array(tensor).copy()
    index = tuple(np.argwhere(integers == 0)[1234])
    integers[index] = 1
    tensor.CopyFrom(numpy_helper.from_array(integers, name))
    report = check_2to4(model)
    assert report.verdict == FAIL
    (offender,) = (w for w in report.weights if w.verdict == VIOLATING)
    assert (offender.name, offender.violating_groups) == (name, 1)
    first = offender.first_violation.index
    assert first == (index[0], index[1] // 4 * 4, index[2], index[3])


def test_excluded_layers_are_as_before(families: Callable[[str], Any], run: Run) -> None:
    family = families("resnet18")
    before = Read(family.model)
    graph = Read(quantized(family, exclude=("layer1.0.conv?", "fc.weight", "layer2.0.downsample*")))
    layers = {node.name: node for node in before.ops("Conv", "Gemm")}
    out = [n for n in layers if n.startswith(("layer1.0.conv", "fc", "layer2.0.downsample"))]
    assert len(out) == 4
    for node in graph.ops("Conv", "Gemm"):
        if node.name in out:
            assert list(node.input) == list(layers[node.name].input)
            np.testing.assert_array_equal(graph.stored[node.input[1]], before.stored[node.input[1]])
        else:
            assert graph.dequantized(node.input[0])


# A first layer whose integers are compared where the next one reads them.


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


def check_integers(
    model: onnx.ModelProto, x: Array, amax: dict[str, float], sums: Callable[[Array, Array], Array], run: Run
) -> Array:
    """The integers that the second layer reads, by ONNX Runtime with and without its fusions, and by NumPy."""
    result = insert_qdq(model, place(model), amax)
    stored = Read(result).stored
    w, scales = stored["w"], stored["w_scale"].astype(np.float64)
    x_scale, a_scale = np.float64(stored["x_scale"]), np.float64(stored["a_scale"])
    integers = np.clip(np.rint(x / np.float32(x_scale)), -128, 127).astype(np.int8)
    total = sums(integers, w)
    to_floats = x_scale * scales.reshape((-1, 1, 1) if w.ndim == 4 else -1)
    bias = stored["b"].reshape((-1, 1, 1)) if "b" in stored else np.float64(0)
    lowest = 0 if any(node.op_type == "Relu" for node in model.graph.node) else -math.inf
    for optimize in (False, True):
        # With its fusions ONNX Runtime adds the bias as an integer, in units of the sum; without, as it is.
        exact = (total + np.rint(bias / to_floats)) * to_floats if optimize else total * to_floats + bias
        expected = np.clip(np.rint(np.maximum(exact, lowest) / a_scale), -128, 127).astype(np.int8)
        found = run(result, x, ["x_quantized", "a_quantized"], optimize=optimize)
        np.testing.assert_array_equal(found["x_quantized"], integers)
        np.testing.assert_array_equal(found["a_quantized"], expected)
    # Not all at the ends, where any arithmetic would agree.
    assert len(np.unique(expected)) > 20
    return expected


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("shape", "geometry"),
    [
        ((8, 8, 3, 3), {"stride": 1, "pad": 1, "group": 1}),
        ((6, 8, 1, 1), {"stride": 2, "pad": 0, "group": 1}),
        ((8, 2, 3, 3), {"stride": 2, "pad": 1, "group": 4}),
        ((8, 1, 5, 5), {"stride": 1, "pad": 2, "group": 8}),
    ],
)
def test_a_convolution_agrees_with_integer_arithmetic(
    shape: tuple[int, ...], geometry: dict[str, int], biased: bool, relu: bool, run: Run
) -> None:
    generator = np.random.default_rng(7)
    w = generator.normal(0, 0.2, shape)
    w[:, ::2] = 0 if shape[1] > 2 else w[:, ::2]
    x = generator.normal(size=(2, 8, 9, 9)).astype(np.float32)
    stride, pad, group = geometry.values()
    bias = generator.normal(size=shape[0]) if biased else None
    model = two_layers(w, x.shape, bias, relu, strides=[stride] * 2, pads=[pad] * 4, group=group)
    amax = {"x": 2.5, "a": 3.1}
    check_integers(model, x, amax, lambda q, w: accumulate(q, w, **geometry), run)


def test_a_matrix_product_agrees_with_integer_arithmetic(run: Run) -> None:
    generator = np.random.default_rng(8)
    x = generator.normal(size=(5, 16)).astype(np.float32)
    model = two_layers(generator.normal(0, 0.2, (16, 12)), x.shape)
    product = check_integers(model, x, {"x": 2.5, "a": 2.0}, lambda q, w: q.astype(np.int64) @ w, run)
    assert product.shape == (5, 12)


def test_ties_round_to_even_as_onnx_runtime_rounds_them(run: Run) -> None:
    # Scales are powers of two, so sums are exact and every odd one is a tie.
    w = np.full((4, 4, 1, 1), 1.0)
    w[:, 0] = 127
    generator = np.random.default_rng(9)
    x = generator.integers(-1, 2, (1, 4, 16, 16)).astype(np.float32)
    x[:, 1:] = generator.integers(-20, 21, (1, 3, 16, 16))
    found = check_integers(two_layers(w, x.shape), x, {"x": 127.0, "a": 254.0}, accumulate, run)
    sums = accumulate(x, w)
    assert ((sums % 2 == 1) & (np.abs(sums) < 254)).sum() > 100
    assert (found[(sums % 2 == 1) & (np.abs(sums) < 254)] % 2 == 0).all()


def test_zero_and_tiny_channels_give_sound_outputs(run: Run) -> None:
    w = np.random.default_rng(3).normal(0, 0.2, (6, 4, 3, 3))
    w[1], w[2] = 0, w[2] * 1e-7
    model = two_layers(w, (1, 4, 8, 8))
    result = insert_qdq(model, place(model), {"x": 1e-9, "a": 0.0})
    stored = Read(result).stored
    for name in ("w_scale", "x_scale", "a_scale"):
        assert (stored[name].astype(np.float16) >= np.finfo(np.float16).smallest_normal).all()
        assert np.isfinite(stored[name].astype(np.float16)).all()
    assert not stored["w"][1:3].any()
    assert np.isfinite(run(result, np.ones((1, 4, 8, 8), np.float32))["y"]).all()


def test_tied_tensors_share_the_largest_range(families: Callable[[str], Any]) -> None:
    family = families("resnet18")
    placement = place(family.model)
    graph = Read(insert_qdq(family.model, placement, {**family.amax, placement.tied[0][1]: 1000.0}))
    assert len(placement.tied[0]) == 2
    for tensor in placement.tied[0]:
        assert math.isclose(float(graph.stored[f"{tensor}_scale"]), 1000 / 127, rel_tol=1e-6)


def test_a_weight_that_others_read_too_keeps_its_floats_beside_the_integers(run: Run) -> None:
    model = two_layers(np.random.default_rng(4).normal(0, 0.2, (8, 8, 3, 3)), (1, 8, 9, 9))
    model.graph.node[1].input[1] = "w"
    x = np.random.default_rng(5).normal(size=(1, 8, 9, 9)).astype(np.float32)
    expected = run(model, x, ["a"])
    amax = {"x": 4.0, "a": float(np.abs(expected["a"]).max())}
    shared = Read(insert_qdq(model, place(model), amax))
    assert len([n for n in shared.ops("DequantizeLinear") if n.input[0] == "w"]) == 2
    assert "w_float" not in shared.stored
    result = insert_qdq(model, place(model, PlaceOptions(("second",))), amax)
    graph = Read(result)
    assert graph.ops("Conv")[1].input[:] == ["a", "w_float"]
    np.testing.assert_array_equal(graph.stored["w_float"], Read(model).stored["w"])
    assert np.linalg.norm(run(result, x)["y"] - expected["y"]) < 0.05 * np.linalg.norm(expected["y"])


def test_a_weight_in_a_constant_node_or_among_the_inputs_becomes_int8(run: Run) -> None:
    model = two_layers(np.random.default_rng(4).normal(0, 0.2, (8, 8, 3, 3)), (1, 8, 9, 9))
    x = np.random.default_rng(5).normal(size=(1, 8, 9, 9)).astype(np.float32)
    expected = run(insert_qdq(model, place(model), {"x": 3.0, "a": 3.0}), x)["y"]
    first = model.graph.initializer[0]
    constant = helper.make_node("Constant", [], ["w"], value=first)
    nodes = [constant, *model.graph.node]
    del model.graph.node[:], model.graph.initializer[0]
    model.graph.node.extend(nodes)
    model.graph.input.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, (4, 8, 1, 1)))
    # Names that ours must not collide with.
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "x_scale"))
    result = insert_qdq(model, place(model), {"x": 3.0, "a": 3.0})
    onnx.checker.check_model(result, full_check=True)
    assert [value.name for value in result.graph.input] == ["x"]
    assert not Read(result).ops("Constant")
    assert Read(result).stored["w"].dtype == Read(result).stored["v"].dtype == np.int8
    assert Read(result).stored["x_scale"] == 0
    np.testing.assert_array_equal(run(result, x)["y"], expected)


def test_an_older_opset_that_has_per_channel_scales_works(run: Run) -> None:
    model = two_layers(np.random.default_rng(4).normal(0, 0.2, (8, 8, 3, 3)), (1, 8, 9, 9), opset=13)
    result = insert_qdq(model, place(model), {"x": 3.0, "a": 3.0})
    onnx.checker.check_model(result, full_check=True)
    assert result.opset_import[0].version == 13
    assert run(result, np.ones((1, 8, 9, 9), np.float32))["y"].shape == (1, 4, 7, 7)


def test_what_cannot_be_quantized_is_refused_with_all_offenders() -> None:
    w = np.random.default_rng(4).normal(0, 0.2, (8, 8, 3, 3))
    model = two_layers(w, (1, 8, 9, 9))
    placement = place(model)
    with pytest.raises(InputError, match="no range") as error:
        insert_qdq(model, placement, {"z": 1.0})
    assert error.value.found == "x, a"
    with pytest.raises(InputError, match=r"x: nan(?s:.)*a: inf"):
        insert_qdq(model, placement, {"x": float("nan"), "a": float("inf")})
    w[0, 0, 0, 0] = np.nan
    broken = two_layers(w, (1, 8, 9, 9))
    with pytest.raises(InputError, match="w: nan"):
        insert_qdq(broken, placement, {"x": 1.0, "a": 1.0})
    result = insert_qdq(model, placement, {"x": 1.0, "a": 1.0})
    for again in (lambda: place(result), lambda: insert_qdq(result, placement, {"x": 1.0, "a": 1.0})):
        with pytest.raises(InputError, match="already quantized"):
            again()
    with pytest.raises(InputError, match="opset 12"):
        insert_qdq(two_layers(w, (1, 8, 9, 9), opset=12), Placement((), (), ()), {})


def test_the_record_of_the_file_says_int8(families: Callable[[str], Any]) -> None:
    assert precision_of(quantized(families("resnet18"))) == "int8"
