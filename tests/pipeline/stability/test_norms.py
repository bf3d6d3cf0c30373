"""Norms, against the singular values of the operator that torch makes of an identity."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.stability.axis import Axis, max_patch_overlap
from maskplan.pipeline.stability.max_singular_value import largest_singular
from maskplan.pipeline.stability.norms import Norm, conv_norm, conv_update_factor, linear_norm, power_iteration

Weight = npt.NDArray[np.float64]
CLOSE = 1 + 1e-6


def operator(weight: npt.NDArray[np.floating], size: tuple[int, int], groups: int = 1, **options: Any) -> Weight:
    """(K * outputs, C * places), by running every unit input through the convolution."""
    channels = weight.shape[1] * groups
    units = torch.eye(channels * size[0] * size[1], dtype=torch.float64).view(-1, channels, *size)
    kernel = torch.from_numpy(weight.astype(np.float64))
    return torch.nn.functional.conv2d(units, kernel, None, groups=groups, **options).flatten(1).numpy().T


def true_norm(weight: npt.NDArray[np.floating], size: tuple[int, int], **options: Any) -> float:
    return float(np.linalg.svd(operator(weight, size, **options), compute_uv=False)[0])


def circular_norm(weight: Weight, size: tuple[int, int]) -> float:
    """Norm of the circular convolution, as a dense matrix written tap by tap."""
    outputs, inputs, high, wide = weight.shape
    places = size[0] * size[1]
    matrix = np.zeros((outputs, places, inputs, places))
    for r, s in itertools.product(range(high), range(wide)):
        for i, j in itertools.product(range(size[0]), range(size[1])):
            seen = (i + r) % size[0] * size[1] + (j + s) % size[1]
            matrix[:, i * size[1] + j, :, seen] += weight[:, :, r, s]
    return float(np.linalg.svd(matrix.reshape(outputs * places, -1), compute_uv=False)[0])


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Weight, dict[str, Any]]:
    kernel, size = draw(pairs(1, 5)), draw(pairs(1, 9))
    options = {"stride": draw(pairs(1, 3)), "padding": draw(pairs(0, 5)), "dilation": draw(pairs(1, 3))}
    for axis in (0, 1):
        assume(size[axis] + 2 * options["padding"][axis] > options["dilation"][axis] * (kernel[axis] - 1))
    groups = draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = random.standard_normal((groups * draw(st.integers(1, 3)), draw(st.integers(1, 3)), *kernel))
    kind = draw(st.sampled_from(["any", "positive", "sparse"]))
    if kind == "positive":
        weight = np.abs(weight)
    elif kind == "sparse":
        weight *= random.random(weight.shape) < 0.5
    return weight, {"size": size, "groups": groups, **options}


@given(convolutions())
@settings(max_examples=250, deadline=None)
def test_no_bound_is_below_the_norm_and_exact_ones_are_it(drawn: tuple[Weight, dict[str, Any]]) -> None:
    weight, options = drawn
    expected = true_norm(weight, **options)
    for dense_limit in (0, 40, 512):
        found = conv_norm(weight, **options, dense_limit=dense_limit)
        assert found.value >= expected
        if found.exact:
            assert found.value <= expected * CLOSE
    assert found.exact, "all these are small enough to be written out"


@given(convolutions())
@settings(max_examples=100, deadline=None)
def test_power_iteration_is_never_above_the_norm_and_close_to_it(drawn: tuple[Weight, dict[str, Any]]) -> None:
    weight, options = drawn
    expected = true_norm(weight, **options)
    found = power_iteration(weight, **options, steps=60)
    assert 0.9 * expected <= found <= expected * (1 + 1e-12)


@given(convolutions())
@settings(max_examples=150, deadline=None)
def test_no_update_moves_a_convolution_by_more_than_its_factor(drawn: tuple[Weight, dict[str, Any]]) -> None:
    weight, options = drawn
    factor = conv_update_factor(weight.shape[2:], options["stride"], options["dilation"])
    assert true_norm(weight, **options) <= factor * np.linalg.norm(weight) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "factor"),
    [
        ((3, 3), (1, 1), (1, 1), 3),
        ((1, 1), (2, 2), (1, 1), 1),
        ((3, 3), (2, 2), (1, 1), 2),
        ((7, 7), (2, 2), (1, 1), 4),
        ((2, 2), (2, 2), (1, 1), 1),
        ((3, 3), (1, 1), (5, 5), 3),
        # All three taps of stride 2, dilation 2 fall on the same places.
        ((3, 3), (2, 2), (2, 2), 3),
        ((3, 3), (2, 2), (3, 3), 2),
        ((1, 4), (1, 1), (1, 1), 2),
        ((5, 3), (2, 1), (1, 1), 3),
    ],
)
def test_the_factor_of_an_update(
    kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int], factor: float
) -> None:
    assert conv_update_factor(kernel, stride, dilation) == pytest.approx(factor)
    # Independently: the norm of the unfolding on a large input.
    size = tuple(4 * step * wide * far for step, wide, far in zip(stride, kernel, dilation, strict=True))
    ones = torch.ones(1, 1, *size, dtype=torch.float64)
    unfolded = torch.nn.functional.unfold(ones, kernel, dilation=dilation, stride=stride)
    times = torch.nn.functional.fold(unfolded, size, kernel, dilation=dilation, stride=stride)
    assert float(times.max()) == pytest.approx(factor**2)


def test_the_factor_of_an_update_is_approached_by_equal_weights() -> None:
    ones = np.ones((1, 1, 3, 3))
    found = power_iteration(ones, size=(60, 60), padding=(1, 1), steps=200)
    assert 0.99 * 9 < found <= conv_update_factor((3, 3)) * np.linalg.norm(ones) == pytest.approx(9)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.integers(0, 6), st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_the_circular_operator_contains_the_padded_operator(
    size: int, kernel: int, stride: int, padding: int, dilation: int
) -> None:
    assume(size + 2 * padding > dilation * (kernel - 1))
    axis = Axis(size, kernel, stride, padding, dilation)
    assert axis.circular_size % stride == 0
    taps = np.random.default_rng(0).standard_normal(kernel)
    padded = operator(taps.reshape(1, 1, 1, -1), (1, size), stride=(1, stride), padding=(0, padding), dilation=dilation)
    lit = padded.any(axis=1)
    places = np.arange(len(padded)) * stride
    circular = np.zeros((axis.circular_size, axis.circular_size))
    for row, tap in itertools.product(range(axis.circular_size), range(kernel)):
        circular[row, (row - padding + dilation * tap) % axis.circular_size] += taps[tap]
    rows = places[lit] % axis.circular_size
    assert len(set(rows.tolist())) == len(rows)
    np.testing.assert_allclose(circular[rows][:, :size], padded[lit], atol=1e-12)


def test_the_circular_size_is_as_small_as_the_taps_allow() -> None:
    assert Axis(56, 3, 1, 1).circular_size == 57
    assert Axis(56, 3, 2, 1).circular_size == 58
    assert Axis(224, 7, 2, 3).circular_size == 228
    assert Axis(10, 3, 1, 0).circular_size == 10
    assert Axis(10, 2, 1, 1).circular_size == 11
    # Padding wider than the kernel adds outputs that read nothing.
    assert Axis(10, 3, 1, 9).circular_size == 12


@given(pairs(2, 6), pairs(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_the_circulant_norm_is_that_of_the_circular_convolution(
    size: tuple[int, int], kernel: tuple[int, int], outputs: int, inputs: int, seed: int
) -> None:
    assume(kernel[0] <= size[0] and kernel[1] <= size[1] and kernel != (1, 1))
    weight = np.random.default_rng(seed).standard_normal((outputs, inputs, *kernel))
    # Without padding the circular size is that of the input. Other bounds may be smaller.
    found = conv_norm(weight, size=size, dense_limit=0)
    circular = circular_norm(weight, size)
    assert found.value <= circular * CLOSE
    if found.method in ("circulant", "depthwise"):
        assert found.value == pytest.approx(circular, rel=1e-6)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 2)])
def test_one_by_one_kernels_are_their_matrix_whatever_the_stride(
    stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    weight = np.random.default_rng(0).standard_normal((20, 30, 1, 1)).astype(np.float32)
    found = conv_norm(weight, size=(6, 7), stride=stride, padding=padding, dense_limit=0)
    assert found.exact
    assert found.method == "matrix"
    expected = np.linalg.norm(weight[:, :, 0, 0].astype(np.float64), 2)
    assert expected <= found.value <= expected * CLOSE


@pytest.mark.parametrize(("outputs", "inputs"), [(5, 3), (3, 5), (1, 9), (40, 20_000)])
def test_linear_norm_is_the_largest_singular_value(outputs: int, inputs: int) -> None:
    weight = np.random.default_rng(1).standard_normal((outputs, inputs)).astype(np.float32)
    found = linear_norm(weight)
    assert found.exact
    expected = np.linalg.norm(weight.astype(np.float64), 2)
    assert expected <= found.value <= expected * CLOSE


def test_patches_that_do_not_overlap_are_exact() -> None:
    weight = np.random.default_rng(2).standard_normal((6, 3, 4, 4))
    found = conv_norm(weight, size=(32, 32), stride=(4, 4), dense_limit=0)
    assert (found.exact, found.method) == (True, "unfolded")
    assert found.value == pytest.approx(np.linalg.norm(weight.reshape(6, -1), 2), rel=1e-6)


def test_taps_that_never_leave_the_padding_do_not_count() -> None:
    weight = np.random.default_rng(3).standard_normal((8, 8, 3, 3))
    found = conv_norm(weight, size=(1, 1), padding=(1, 1), dense_limit=0)
    assert found.exact
    assert found.value == pytest.approx(np.linalg.norm(weight[:, :, 1, 1], 2), rel=1e-6)


def test_an_operator_whose_outputs_all_see_padding_is_zero() -> None:
    assert conv_norm(np.ones((2, 2, 1, 1)), size=(1, 1), padding=(1, 1), stride=(3, 3)) == Norm(0.0, True, "matrix")
    assert true_norm(np.ones((2, 2, 1, 1)), (1, 1), padding=1, stride=3) == 0
    assert conv_norm(np.zeros((4, 4, 3, 3)), size=(60, 60), padding=(1, 1), dense_limit=0).value == 0
    assert linear_norm(np.zeros((3, 4))).value == 0
    assert power_iteration(np.zeros((4, 4, 3, 3)), size=(5, 5)) == 0


def test_groups_count_by_the_largest_and_depthwise_by_the_largest_channel() -> None:
    random = np.random.default_rng(4)
    weight = random.standard_normal((6, 2, 3, 3))
    options: dict[str, Any] = {"size": (9, 9), "padding": (1, 1), "dense_limit": 0}
    parts = [conv_norm(part, **options).value for part in np.split(weight, 3)]
    assert conv_norm(weight, **options, groups=3).value == pytest.approx(max(parts))
    channels = random.standard_normal((40, 1, 3, 3))
    found = conv_norm(channels, **options, groups=40)
    assert found.method == "depthwise"
    assert found.value == pytest.approx(max(conv_norm(each[None], **options).value for each in channels))


def test_masking_can_raise_the_norm() -> None:
    assert (
        linear_norm(np.array([[1.0, 1.0], [1.0, 0.0]])).value > linear_norm(np.array([[1.0, 1.0], [1.0, -1.0]])).value
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-200, 1e150, 1e300])
def test_norms_scale_with_the_weights(scale: float) -> None:
    random = np.random.default_rng(5)
    weight, matrix = random.standard_normal((4, 4, 3, 3)), random.standard_normal((4, 7))
    for dense_limit in (0, 512):
        options: dict[str, Any] = {"size": (5, 5), "padding": (1, 1), "dense_limit": dense_limit}
        assert conv_norm(weight * scale, **options).value / scale == pytest.approx(conv_norm(weight, **options).value)
    assert linear_norm(matrix * scale).value / scale == pytest.approx(linear_norm(matrix).value)


def test_a_larger_case_lies_between_power_iteration_and_the_unfolded_bound() -> None:
    weight = np.random.default_rng(6).standard_normal((48, 32, 3, 3)) / 17
    for stride in (1, 2):
        options: dict[str, Any] = {"size": (28, 28), "padding": (1, 1), "stride": (stride, stride)}
        found = conv_norm(weight, **options)
        assert found.method == "circulant"
        low = power_iteration(weight, **options, steps=100)
        unfolded = conv_update_factor((3, 3), (stride, stride)) * np.linalg.norm(weight.reshape(48, -1), 2)
        assert low <= found.value < 1.15 * low
        assert found.value < 0.9 * unfolded


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_the_largest_of_many_matrices_is_found_in_any_order(high: int, wide: int, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    matrices = random.standard_normal((count, high, wide)) + 1j * random.standard_normal((count, high, wide))
    matrices[random.random(count) < 0.3] *= 1e-8
    # Equal largest ones among them, as every symmetric kernel has.
    matrices = random.permutation(np.concatenate([matrices, matrices]))
    expected = np.linalg.svd(matrices, compute_uv=False).max()
    step = int(random.integers(1, len(matrices) + 1))
    found = largest_singular(torch.from_numpy(matrices[i : i + step]) for i in range(0, len(matrices), step))
    assert expected <= found <= expected * CLOSE


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), list(itertools.product(range(1, 6), range(1, 5), range(1, 5)))
)
def test_the_overlap_of_patches_is_counted(kernel: int, stride: int, dilation: int) -> None:
    axis = Axis(60, kernel, stride, 0, dilation)
    assert axis.max_overlap == max_patch_overlap(kernel, stride, dilation)


def test_invalid_convolutions_are_refused() -> None:
    weight = np.ones((4, 2, 3, 3))
    for options in ({"size": (2, 2)}, {"size": (5, 5), "groups": 3}, {"size": (5, 5), "stride": (0, 1)}):
        with pytest.raises(ValueError, match=r"no such convolution|not the weight|wider"):
            conv_norm(weight, **options)
    with pytest.raises(ValueError, match="linear"):
        linear_norm(weight)
    with pytest.raises(InputError, match="1 of 4 are NaN"):
        linear_norm(np.array([[1.0, np.nan], [0, 0]]))
    with pytest.raises(InputError, match="finite"):
        conv_norm(np.full((1, 1, 3, 3), np.inf, dtype=np.float32), size=(5, 5))
