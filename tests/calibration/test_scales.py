"""Scales and integers against ONNX Runtime's QuantizeLinear, and at the edges of FP16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from maskplan.calibration.scales import quantize_weight, scale_of

Array = npt.NDArray[Any]


def weight(shape: tuple[int, ...] = (6, 8, 3, 3), seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 0.1, shape).astype(np.float32)


@given(st.floats(0, 127 * 65504.0))
def test_every_scale_is_normal_also_in_fp16(amax: float) -> None:
    scale = scale_of(amax)
    assert np.float32(scale) == scale
    assert np.finfo(np.float16).smallest_normal <= np.float16(scale) <= np.finfo(np.float16).max


@given(st.floats(0.01, 1e6))
def test_the_range_becomes_127(amax: float) -> None:
    assert scale_of(amax) == np.float32(amax / 127)
    assert np.rint(np.float32(amax) / np.float32(scale_of(amax))) == 127


def test_a_range_of_zeros_has_scale_1() -> None:
    assert scale_of(0.0) == 1.0


@pytest.mark.parametrize("amax", [float("nan"), float("inf"), -1.0, 127 * 65600.0])
def test_what_is_no_range_is_refused(amax: float) -> None:
    with pytest.raises(ValueError, match="range"):
        scale_of(amax)


@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 8, 3, 3), 0), ((8, 5), 1), ((8, 5), -1), ((5, 8), 0), ((4, 1, 3, 3), 0)]
)
def test_integers_are_those_of_onnx_runtimes_quantize_linear(
    shape: tuple[int, ...], axis: int, run: Callable[..., dict[str, Array]]
) -> None:
    values = weight(shape)
    integers, scales = quantize_weight(values, axis)
    assert (integers.dtype, scales.dtype, scales.shape) == (np.int8, np.float32, (shape[axis],))
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], axis=axis)
    graph = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT8, shape)],
        [numpy_helper.from_array(scales, "s"), numpy_helper.from_array(np.zeros(scales.shape, np.int8), "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    np.testing.assert_array_equal(integers, run(model, values)["y"])
    assert (np.abs(np.moveaxis(integers, axis, 0).reshape(shape[axis], -1)).max(1) == 127).all()


def test_halves_round_to_even() -> None:
    # The largest value makes the scale 1, so the others are halves exactly.
    values = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]], np.float32)
    integers, scales = quantize_weight(values, 0)
    assert scales.tolist() == [1.0]
    assert integers.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_zeros_stay_zeros_and_minus_128_is_not_used() -> None:
    values = weight()
    values[np.abs(values) < 0.05] = 0
    values[0, 0, 0, 0] = -5
    values[1, 1, 1, 1] = -0.0
    integers, _ = quantize_weight(values, 0)
    assert (integers[values == 0] == 0).all()
    assert integers.min() == integers[0, 0, 0, 0] == -127


def test_channels_of_zeros_and_of_tiny_weights_have_sound_scales() -> None:
    values = weight((5, 4, 1, 1))
    values[1] = 0
    values[2] *= 1e-6
    values[3] = np.float32(1e-42)
    integers, scales = quantize_weight(values, 0)
    assert scales[1] == 1.0
    assert (scales[2:4] == np.finfo(np.float16).smallest_normal).all()
    assert (integers[1:4] == 0).all()
    # Rounding to the smallest scale loses at most half of it.
    assert np.abs(values - integers * scales[:, None, None, None]).max() <= scales.max() / 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e9])
def test_values_that_are_no_weights_are_refused(bad: float) -> None:
    values = weight()
    values[2, 3, 1, 1] = bad
    with pytest.raises(ValueError, match="range"):
        quantize_weight(values, 0)
