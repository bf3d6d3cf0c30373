"""Ranges agree with ONNX Runtime's calibrators, and those of least squared error are never worse than min-max."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from maskplan.calibration.activations import collect_histograms
from maskplan.calibration.histogram import Histogram
from maskplan.calibration.ranges import METHODS, RangeOptions, amax_of
from maskplan.calibration.scales import scale_of
from maskplan.pipeline.core.errors import InputError

Floats = npt.NDArray[np.float32]

BINS, PERCENTILE = 512, 99.9
TENSORS = ("x", "relu", "zeros", "constant", "negative", "cube", "heavy", "relu6", "swish", "shifted", "small", "below")


def many_distributions() -> onnx.ModelProto:
    constants = {"zero": 0, "three": 3, "minus": -3, "six": 6, "half": 0.5, "tiny": 1e-3}
    nodes = [
        helper.make_node("Relu", ["x"], ["relu"]),
        helper.make_node("Mul", ["x", "zero"], ["zeros"]),
        helper.make_node("Add", ["zeros", "three"], ["constant"]),
        helper.make_node("Add", ["zeros", "minus"], ["negative"]),
        helper.make_node("Mul", ["x", "x"], ["square"]),
        helper.make_node("Mul", ["square", "x"], ["cube"]),
        helper.make_node("Mul", ["square", "cube"], ["heavy"]),
        helper.make_node("Mul", ["x", "three"], ["wide"]),
        helper.make_node("Clip", ["wide", "zero", "six"], ["relu6"]),
        helper.make_node("HardSwish", ["wide"], ["swish"]),
        helper.make_node("Add", ["x", "half"], ["shifted"]),
        helper.make_node("Mul", ["relu", "tiny"], ["small"]),
        helper.make_node("Neg", ["relu"], ["below"]),
    ]
    graph = helper.make_graph(
        nodes,
        "distributions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 256])],
        [helper.make_tensor_value_info("below", TensorProto.FLOAT, ["n", 256])],
        [numpy_helper.from_array(np.float32(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


BATCHES = [np.random.default_rng(i).standard_normal((300, 256), dtype=np.float32) * (1 + i / 10) for i in range(4)]


@pytest.fixture(scope="module")
def histograms() -> dict[str, Histogram]:
    return collect_histograms(many_distributions(), TENSORS, BATCHES)


def theirs(calibrator: Any, folder: Path, **options: Any) -> dict[str, float]:
    """The larger end of the range that ONNX Runtime's calibrator finds for each tensor."""
    path = folder / "model.onnx"
    onnx.save(many_distributions(), path)
    feeds = iter([{"x": batch} for batch in BATCHES])

    class Reader:
        def get_next(self) -> dict[str, Floats] | None:
            return next(feeds, None)

    with contextlib.redirect_stdout(io.StringIO()):
        made = calibrator(path, augmented_model_path=str(folder / "augmented.onnx"), **options)
        made.augment_graph()
        made.create_inference_session()
        made.collect_data(Reader())
        ranges = made.compute_data()
    return {name: float(max(np.abs(data.range_value[i]).max() for i in (0, 1))) for name, data in ranges.items()}


def test_min_max_is_onnx_runtimes(histograms: dict[str, Histogram], tmp_path: Path) -> None:
    from onnxruntime.quantization.calibrate import MinMaxCalibrater

    expected = theirs(MinMaxCalibrater, tmp_path, symmetric=True)
    for name in TENSORS:
        assert amax_of(histograms[name], RangeOptions("minmax")) == expected[name], name


def test_percentiles_are_onnx_runtimes_within_a_bin(histograms: dict[str, Histogram], tmp_path: Path) -> None:
    from onnxruntime.quantization.calibrate import PercentileCalibrater

    expected = theirs(PercentileCalibrater, tmp_path, symmetric=True, num_bins=BINS, percentile=PERCENTILE)
    for name in TENSORS:
        ours = amax_of(histograms[name], RangeOptions("percentile", PERCENTILE))
        assert abs(ours - expected[name]) <= histograms[name].amax / BINS * (1 + 1e-4), name


def test_entropy_is_onnx_runtimes_within_a_bin(histograms: dict[str, Histogram], tmp_path: Path) -> None:
    from onnxruntime.quantization.calibrate import EntropyCalibrater

    expected = theirs(EntropyCalibrater, tmp_path, num_bins=BINS, num_quantized_bins=128)
    narrowed = 0
    for name in TENSORS:
        ours = amax_of(histograms[name], RangeOptions("entropy", bins=BINS))
        assert abs(ours - expected[name]) <= 2 * histograms[name].amax / BINS * (1 + 1e-4), name
        narrowed += ours < 0.9 * histograms[name].amax
    assert narrowed >= 4, "agreement on the largest magnitude alone says little"


@pytest.mark.parametrize("seed", range(6))
def test_entropy_is_onnx_runtimes_within_a_bin_on_few_values_where_edges_coincide(seed: int) -> None:
    from onnxruntime.quantization.calibrate import HistogramCollector

    values = np.random.default_rng(seed).standard_normal(3000, dtype=np.float32) ** (1 + 2 * (seed % 3))
    if seed % 2:
        values = np.maximum(values, 0)
    values /= np.abs(values).max()
    collector = HistogramCollector("entropy", False, BINS, 128, None, "same")
    with contextlib.redirect_stdout(io.StringIO()):
        collector.collect({"values": values})
        lowest, highest, *_ = collector.compute_collection_result()["values"]
    expected = max(abs(float(lowest)), abs(float(highest)))
    # Divergences in float32 and in float64 may order near ties differently.
    assert abs(amax_of(histogram_of(values), RangeOptions("entropy", bins=BINS)) - expected) <= 2 / BINS * (1 + 1e-4)


def test_a_percentile_is_that_of_the_sorted_magnitudes() -> None:
    values = np.random.default_rng(0).standard_normal(10_000, dtype=np.float32)
    histogram = histogram_of(values)
    ordered = np.sort(np.abs(values))
    for percentile, rank in ((50, 5000), (99.9, 9990), (99.99, 9999), (100, 10_000)):
        found = amax_of(histogram, RangeOptions("percentile", percentile))
        assert ordered[rank - 1] <= found <= ordered[rank - 1] + histogram.width


@st.composite
def activations(draw: st.DrawFn) -> Floats:
    """Values of many shapes: a few drawn one by one, or many of a distribution, with outliers."""
    if draw(st.booleans()):
        numbers = st.floats(-1000, 1000, width=32, allow_subnormal=False)
        return draw(hnp.arrays(np.float32, st.integers(1, 60), elements=numbers))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = generator.standard_normal(draw(st.integers(1, 20_000)), dtype=np.float32)
    values = np.sign(values) * np.abs(values) ** draw(st.sampled_from([0.1, 1, 2, 5]))
    if draw(st.booleans()):
        values = np.maximum(values, 0)
    outliers = draw(st.integers(0, min(5, values.size)))
    values[:outliers] *= np.float32(draw(st.sampled_from([2, 10, 100, 1000])))
    # Beyond 127 * 65504 there are no scales.
    return np.clip(values * np.float32(draw(st.sampled_from([1e-6, 1e-3, 1, 1e3]))), -8e6, 8e6)


@settings(deadline=None, max_examples=300)
@given(values=activations())
@example(values=np.float32([127, 1, 1, 1, 1, 1]))
@example(values=np.float32([1000] + [0.49] * 1000))
def test_least_squares_never_quantize_worse_than_min_max(values: Floats) -> None:
    histogram = histogram_of(values)
    chosen = amax_of(histogram, RangeOptions("mse"))
    assert squared_error(values, chosen) <= squared_error(values, histogram.amax)


def test_a_gain_that_the_width_of_bins_may_have_made_is_not_taken() -> None:
    # Both values are whole multiples of min-max's scale, which is 1. At half a width above 36, the middle of its bin,
    # a narrower range seems to do better, and with so many values to make up for the one that it clips.
    histogram = histogram_of(np.float32([127]))
    many = np.full(1 << 20, 36, np.float32)
    for _ in range(110):
        histogram.update(many)
    assert amax_of(histogram, RangeOptions("mse")) == 127


def test_least_squares_come_close_to_the_best_range_there_is() -> None:
    values = np.random.default_rng(1).standard_normal(100_000, dtype=np.float32)
    values[0] = 40
    histogram = histogram_of(values)
    chosen = amax_of(histogram, RangeOptions("mse"))
    best = min(squared_error(values, a) for a in np.linspace(0.5, 40, 400))
    assert squared_error(values, chosen) <= 1.02 * best < 0.7 * squared_error(values, histogram.amax)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_alone_have_range_zero_and_a_dead_tensor_keeps_its_few_values(method: str) -> None:
    assert amax_of(histogram_of(np.float32([0, -0.0, 0])), RangeOptions(method)) == 0
    nearly_dead = np.zeros(1_000_000, np.float32)
    nearly_dead[0] = 5
    assert 0 < amax_of(histogram_of(nearly_dead), RangeOptions(method)) <= 5


@pytest.mark.parametrize("method", METHODS)
def test_a_range_is_at_most_the_largest_magnitude(method: str) -> None:
    for seed in range(5):
        values = np.random.default_rng(seed).standard_normal(100 * seed + 1, dtype=np.float32)
        histogram = histogram_of(values)
        assert 0 < amax_of(histogram, RangeOptions(method)) <= histogram.amax


def test_a_histogram_without_finite_values_is_refused() -> None:
    for histogram in (Histogram(), histogram_of(np.float32([1, np.nan]))):
        with pytest.raises(ValueError, match="no values"):
            amax_of(histogram, RangeOptions())


@pytest.mark.parametrize(
    "options", [{"method": "kl"}, {"percentile": 0}, {"percentile": 100.5}, {"bins": 64}, {"bins": 129}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=str(next(iter(options)))):
        RangeOptions(**options)


def histogram_of(values: Floats) -> Histogram:
    histogram = Histogram()
    histogram.update(values)
    return histogram


def squared_error(values: Floats, amax: float) -> float:
    """Of what ONNX's QuantizeLinear and DequantizeLinear make of the values, in float32."""
    scale = np.float32(scale_of(amax))
    quantized = np.clip(np.rint(values / scale), -127, 127) * scale
    return float(np.mean((values.astype(np.float64) - quantized) ** 2))
