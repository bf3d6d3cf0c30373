"""Q/DQ graphs of five families: TensorRT's rules, 2:4 on the integers, and arithmetic to the last integer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from qdq_graphs import Array, Read
from sklearn.datasets import load_digits

from maskplan.calibration.placement import PlaceOptions, place
from maskplan.calibration.qdq import insert_qdq
from maskplan.exporters.conformance import check_2to4
from maskplan.exporters.metadata import precision_of, read_provenance
from maskplan.exporters.onnx_export import trace
from maskplan.pipeline.core.choices import CONFORMING, FAIL, PASS, VIOLATING
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint

Run = Callable[..., dict[str, Array]]
both_ways = pytest.mark.parametrize("quantize_outputs", [False, True], ids=["inputs", "outputs"])
FUSED_ACTIVATIONS = ("Relu", "HardSwish", "HardSigmoid")


def quantized(family: Any, quantize_outputs: bool = False, exclude: tuple[str, ...] = ()) -> onnx.ModelProto:
    placement = place(family.model, PlaceOptions(exclude, quantize_outputs))
    return insert_qdq(family.model, placement, family.amax)


@both_ways
def test_layers_read_int8_and_biases_are_float(family: Any, quantize_outputs: bool) -> None:
    graph = Read(quantized(family, quantize_outputs))
    layers = graph.ops("Conv", "Gemm", "MatMul")
    assert len(layers) > 10
    for layer in layers:
        data, weight = graph.producers[layer.input[0]], graph.producers[layer.input[1]]
        assert data.op_type == weight.op_type == "DequantizeLinear"
        assert graph.producers[data.input[0]].op_type == "QuantizeLinear"
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
def test_no_pair_separates_a_layer_from_its_activation(family: Any, quantize_outputs: bool) -> None:
    before, after = Read(family.model), Read(quantized(family, quantize_outputs))
    seen = 0
    for node in before.ops("Conv", "Gemm", "Add"):
        readers = before.readers(node.output[0])
        if len(readers) == 1 and readers[0].op_type in FUSED_ACTIVATIONS:
            assert [r.name for r in after.readers(node.output[0])] == [readers[0].name]
            seen += 1
    assert seen >= 9


# Residual additions; of these, with a convolution on both branches.
ADDITIONS = {"resnet18": (8, 3), "mobilenet_v3_small": (6, 0), "vgg": (0, 0)}


@both_ways
def test_of_a_residual_addition_the_skip_alone_is_quantized(family: Any, quantize_outputs: bool) -> None:
    before, after = Read(family.model), Read(quantized(family, quantize_outputs))
    seen = twice = 0
    sums = {node.name: node for node in after.ops("Add")}
    for node in before.ops("Add"):
        direct = [before.producers[x].op_type == "Conv" and len(before.readers(x)) == 1 for x in node.input]
        assert any(direct)
        pairs = [after.dequantized(x) for x in sums[node.name].input]
        assert sorted(pairs) == [False, True]
        # The one in float is a convolution's own output.
        assert direct[pairs.index(False)]
        seen, twice = seen + 1, twice + all(direct)
    assert (seen, twice) == ADDITIONS.get(family.name, (0, 0))


# Concatenations whose inputs are quantized, of how many.
JOINED = {
    ("shufflenet_v2", False): (6, 6),
    ("shufflenet_v2", True): (6, 6),
    ("densenet", False): (0, 12),
    ("densenet", True): (12, 12),
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
POOLS = {"resnet18": 1, "vgg": 4, "shufflenet_v2": 1}


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


@pytest.mark.slow
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
    assert after.producers["logits"].op_type == "Gemm"


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


@pytest.fixture(scope="module")
def trained() -> tuple[onnx.ModelProto, Array]:
    """The bundled network, and images for it."""
    module, provenance = open_checkpoint(ModelOptions("digits_resnet"))
    preprocessing = provenance.preprocessing
    images = (load_digits().images[:, None] / 16 - preprocessing.mean[0]) / preprocessing.std[0]
    return trace(module, provenance), images


@both_ways
def test_a_trained_network_keeps_its_predictions(
    quantize_outputs: bool, run: Run, trained: tuple[onnx.ModelProto, Array]
) -> None:
    model, images = trained
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


def test_tied_tensors_share_the_largest_range(families: Callable[[str], Any]) -> None:
    family = families("resnet18")
    placement = place(family.model)
    graph = Read(insert_qdq(family.model, placement, {**family.amax, placement.tied[0][1]: 1000.0}))
    assert len(placement.tied[0]) == 2
    for tensor in placement.tied[0]:
        assert math.isclose(float(graph.stored[f"{tensor}_scale"]), 1000 / 127, rel_tol=1e-6)


def test_the_record_of_the_file_says_int8(families: Callable[[str], Any]) -> None:
    assert precision_of(quantized(families("resnet18"))) == "int8"
