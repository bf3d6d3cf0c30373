"""Activations are counted as a plain run gives them, whatever the batches, and what is not finite is traced to its maker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from maskplan.calibration import activations
from maskplan.calibration.activations import collect_histograms
from maskplan.calibration.histogram import Histogram
from maskplan.pipeline.core.errors import InputError

Images = npt.NDArray[np.float32]
TENSORS = ("relu", "images", "pooled")


def network(batch: str | int = "n", **weights: Any) -> onnx.ModelProto:
    """Conv, Relu, Conv, global average, Gemm."""
    generator = np.random.default_rng(0)
    shapes = {"first": (4, 3, 3, 3), "second": (4, 4, 3, 3), "last": (4, 5)}
    values = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()} | weights
    nodes = [
        helper.make_node("Conv", ["images", "first"], ["conv"], "conv_1"),
        helper.make_node("Relu", ["conv"], ["relu"], "relu_1"),
        helper.make_node("Conv", ["relu", "second"], ["conv2"], "conv_2"),
        helper.make_node("GlobalAveragePool", ["conv2"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["pooled"]),
        helper.make_node("Gemm", ["pooled", "last"], ["logits"], "gemm"),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 5])],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def images(count: int, seed: int = 0) -> Images:
    return np.random.default_rng(seed).standard_normal((count, 3, 16, 16), dtype=np.float32)


def same(one: Histogram, other: Histogram) -> bool:
    ends = [(h.count, h.lowest, h.highest, h.exponent) for h in (one, other)]
    return ends[0] == ends[1] and np.array_equal(one.counts, other.counts)


def test_histograms_are_those_of_a_plain_run() -> None:
    model, batch = network(), images(8)
    found = collect_histograms(model, TENSORS, [batch])
    assert list(found) == list(TENSORS)
    exposed = network()
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in ("relu", "pooled"))
    session = onnxruntime.InferenceSession(exposed.SerializeToString(), providers=["CPUExecutionProvider"])
    for name, values in zip(("relu", "pooled"), session.run(["relu", "pooled"], {"images": batch}), strict=True):
        assert found[name].count == values.size
        assert found[name].amax == pytest.approx(np.abs(values).max(), rel=1e-5)
        assert found[name].lowest == pytest.approx(values.min(), rel=1e-5)
        edges = np.linspace(-found[name].amax, found[name].amax, 129)
        expected, _ = np.histogram(values, edges)
        assert np.abs(found[name].spread(128) - expected).sum() <= 0.02 * values.size
    images_alone = Histogram()
    images_alone.update(batch)
    assert same(found["images"], images_alone)
    assert model == network(), "the model was changed"


def test_sizes_of_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = images(13)
    whole = collect_histograms(network(), TENSORS, [everything])
    # One activation fits, then a few.
    for slice_bytes in (1, 50_000):
        monkeypatch.setattr(activations, "_SLICE_BYTES", slice_bytes)
        for cuts in ([5], [1, 2, 12], []):
            parts = collect_histograms(network(), TENSORS, np.split(everything, cuts))
            for name in TENSORS:
                assert parts[name].count == whole[name].count
                assert parts[name].amax == pytest.approx(whole[name].amax, rel=1e-5)


def test_a_fixed_batch_is_filled_up_and_the_filling_not_counted() -> None:
    free = collect_histograms(network(), TENSORS, [images(11)])
    fixed = collect_histograms(network(batch=4), TENSORS, [images(11)])
    for name in TENSORS:
        assert fixed[name].count == free[name].count
        assert fixed[name].amax == pytest.approx(free[name].amax, rel=1e-5)


def test_batches_are_taken_one_at_a_time_and_once() -> None:
    taken = []

    def stream() -> Iterator[Images]:
        for seed in range(4):
            taken.append(seed)
            yield images(2, seed)

    assert collect_histograms(network(), ["relu"], stream())["relu"].count == 8 * 4 * 14 * 14
    assert taken == [0, 1, 2, 3]


@pytest.mark.parametrize("batches", [[], [images(0)], [images(0), images(0)]])
def test_no_images_are_one_clear_error(batches: list[Images]) -> None:
    with pytest.raises(InputError, match="no images to calibrate on"):
        collect_histograms(network(), TENSORS, batches)


def broken(shape: tuple[int, ...], value: float) -> Images:
    weight = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    weight.flat[0] = value
    return weight


def test_a_weight_that_is_nan_is_traced_to_its_layer() -> None:
    # Relu hands NaN on, and the second convolution too.
    with pytest.raises(InputError) as caught:
        collect_histograms(
            network(first=broken((4, 3, 3, 3), np.nan)), ["pooled", "relu"], [images(2)], where="net.onnx"
        )
    assert "tensor conv, output of Conv conv_1, of net.onnx" in str(caught.value)
    assert "NaN; its constant first is not finite either" in str(caught.value)


def test_an_overflow_is_traced_to_the_first_node_that_makes_it() -> None:
    huge = np.full((4, 4, 3, 3), 1e38, np.float32)
    with pytest.raises(InputError) as caught:
        collect_histograms(network(second=huge, last=broken((4, 5), np.nan)), TENSORS, [images(3)])
    assert "tensor conv2, output of Conv conv_2" in str(caught.value)
    assert "infinity" in str(caught.value)


def test_values_late_in_the_stream_are_counted() -> None:
    calm, wild = images(2), images(2)
    wild[1] *= 1e30
    with pytest.raises(InputError, match="output of Conv conv_2"):
        collect_histograms(network(second=np.full((4, 4, 3, 3), 1e10)), TENSORS, [calm] * 3 + [wild])


@pytest.mark.parametrize("tensors", [["images"], ["pooled"]])
def test_nan_images_are_named_as_the_cause(tensors: list[str]) -> None:
    bad = images(3)
    bad[2, 1, 5, 5] = np.nan
    with pytest.raises(InputError, match="the images are NaN or infinite"):
        collect_histograms(network(), tensors, [images(2), bad])


def test_images_of_another_shape_are_one_clear_error() -> None:
    with pytest.raises(InputError, match="cannot run the model"):
        collect_histograms(network(), TENSORS, [np.zeros((2, 1, 16, 16), np.float32)])


def test_a_tensor_that_is_not_in_the_graph_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        collect_histograms(network(), ["relu", "nowhere"], [images(1)])
