"""Transposable masks of weights: tiles cut as loops cut them, masks against a search over all masks of a tile."""

from __future__ import annotations

import itertools
import subprocess
import sys
from functools import cache

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.conformance import CheckOptions, check_2to4
from maskplan.exporters.counting import count_groups
from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.masking.patterns import parse_pattern
from maskplan.pipeline.masking.transposable import (
    transposable_mask,
    transposable_masks,
    transposed_violations,
)

TWO_FOUR = Pattern(2, 4)
SMALL = [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4), (4, 4)]
VALUES = st.sampled_from([0.0, 1.0, 1.0, 2.0, 3.0, 5.0, 8.0, 0.5, 1e-3, 100.0])


@cache
def all_masks(n: int, m: int) -> npt.NDArray[np.bool_]:
    """Every tile of zeros and ones whose rows and columns sum to N."""
    rows = [row for row in itertools.product((0, 1), repeat=m) if sum(row) == n]
    tiles = np.array(list(itertools.product(rows, repeat=m)), np.bool_)
    return tiles[(tiles.sum(axis=1) == n).all(axis=1)]


def most(tile: npt.NDArray[np.floating], n: int) -> float:
    """What the best of all masks keeps."""
    return float((all_masks(n, len(tile)) * np.abs(tile.astype(np.float64))).sum(axis=(1, 2)).max())


def kept_by(tile: npt.NDArray[np.floating], mask: npt.NDArray[np.bool_]) -> float:
    return float(np.abs(tile.astype(np.float64))[mask].sum())


def weights_of(kind: str, shape: tuple[int, ...], seed: int = 0) -> npt.NDArray[np.floating]:
    rng = np.random.default_rng(seed)
    if kind == "ties":
        return rng.integers(-2, 3, shape).astype(np.float32)
    if kind == "heavy":
        return rng.standard_t(1, shape)
    return rng.standard_normal(shape).astype(kind)


@given(data=st.data(), pattern=st.sampled_from(SMALL))
@settings(max_examples=60, deadline=None)
def test_the_exact_mask_of_a_small_tile_keeps_what_the_best_of_all_masks_keeps(
    data: st.DataObject, pattern: tuple[int, int]
) -> None:
    n, m = pattern
    tile = np.array(data.draw(st.lists(VALUES, min_size=m * m, max_size=m * m))).reshape(m, m)
    mask = transposable_mask(tile, Pattern(n, m))
    assert (mask.sum(axis=0) == n).all()
    assert (mask.sum(axis=1) == n).all()
    assert kept_by(tile, mask) == pytest.approx(most(tile, n), rel=1e-14)


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "ties", "heavy"])
@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 2), (2,)])
@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (3, 4)])
def test_tiles_are_of_output_by_input_channels_at_each_kernel_position(
    kind: str, kernel: tuple[int, ...], pattern: tuple[int, int]
) -> None:
    n, m = pattern
    weight = weights_of(kind, (2 * m, 3 * m, *kernel))
    mask = transposable_mask(weight, Pattern(n, m))
    assert mask.shape == weight.shape
    assert mask.dtype == np.bool_
    assert mask.flags.c_contiguous
    swept = 0
    for tap in np.ndindex(*kernel):
        for k, c in itertools.product(range(0, 2 * m, m), range(0, 3 * m, m)):
            at = (slice(k, k + m), slice(c, c + m), *tap)
            assert kept_by(weight[at], mask[at]) == pytest.approx(most(weight[at], n), rel=1e-14)
            swept += 1
    assert swept == 6 * np.prod(kernel, dtype=int)


@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (2, 6), (4, 8), (5, 8), (8, 8), (8, 16)])
def test_masks_conform_along_both_axes(pattern: tuple[int, int]) -> None:
    n, m = pattern
    weight = weights_of("float32", (3 * m, 2 * m, 3, 3))
    mask = transposable_mask(weight, Pattern(n, m))
    for axis in (0, 1):
        assert count_groups(mask, axis, n, m).violating == 0
    assert transposed_violations(mask, Pattern(n, m)) == (0, 0)
    assert mask.sum() * m == weight.size * n


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_a_masked_weight_and_its_transpose_pass_the_check(pattern: str) -> None:
    weight = weights_of("float32", (16, 32, 3, 3))
    sparse = np.where(transposable_mask(weight, parse_pattern(pattern)), weight, np.float32(0))
    one_way = np.where(magnitude_mask(weight, parse_pattern(pattern)), weight, np.float32(0))

    def verdicts(values: npt.NDArray[np.floating]) -> tuple[str, str]:
        both = (values, np.ascontiguousarray(values.swapaxes(0, 1)))
        reports = [check_2to4(convolution(v), CheckOptions(pattern=pattern, strict=True)) for v in both]
        return reports[0].verdict, reports[1].verdict

    assert verdicts(sparse) == ("pass", "pass")
    assert verdicts(one_way) == ("pass", "fail")


def convolution(weight: npt.NDArray[np.floating]) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], "conv")],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, weight.shape[1], 4, 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_violations_are_counted_along_each_axis() -> None:
    mask = np.zeros((4, 8, 1, 1), np.bool_)
    mask[0, 4:7] = True
    assert transposed_violations(mask, TWO_FOUR) == (1, 0)
    mask[1:3, 4] = True
    assert transposed_violations(mask, TWO_FOUR) == (1, 1)


@pytest.mark.parametrize("shape", [(512, 1024), (4, 70000), (70000, 4), (8, 8, 160, 160), (96, 128, 3, 3)])
def test_masks_do_not_depend_on_chunks_and_threads(shape: tuple[int, ...]) -> None:
    weight = weights_of("ties", shape)
    mask = transposable_mask(weight, TWO_FOUR, threads=3)
    assert np.array_equal(mask, transposable_mask(weight, TWO_FOUR, threads=1))
    rng = np.random.default_rng(0)
    for _ in range(20):
        k, c = (4 * int(rng.integers(size // 4)) for size in shape[:2])
        part = (slice(k, k + 4), slice(c, c + 4))
        assert np.array_equal(mask[part], transposable_mask(weight[part], TWO_FOUR))


def test_memory_order_does_not_matter_and_weights_do_not_change() -> None:
    weight = weights_of("float64", (8, 16, 3, 3))
    strided = np.asfortranarray(weight)
    strided.setflags(write=False)
    assert np.array_equal(transposable_mask(strided, TWO_FOUR), transposable_mask(weight, TWO_FOUR))
    assert np.array_equal(strided, weight)


@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**-60, 2.0**60, 2.0**1020])
def test_the_scale_of_weights_does_not_matter(scale: float) -> None:
    """What two powers of two tell apart is told apart at any scale."""
    weight = np.random.default_rng(0).integers(-8, 8, (16, 16)).astype(np.float64)
    for pattern in (TWO_FOUR, Pattern(4, 8)):
        assert np.array_equal(transposable_mask(weight * scale, pattern), transposable_mask(weight, pattern))


def test_a_weight_of_zeros_keeps_n_of_m() -> None:
    for n, m in ((2, 4), (3, 8)):
        mask = transposable_mask(np.zeros((2 * m, m, 3, 3), np.float32), Pattern(n, m))
        assert transposed_violations(mask, Pattern(n, m)) == (0, 0)
        assert mask.sum() * m == mask.size * n


def test_no_weights_and_empty_weights_are_valid() -> None:
    assert transposable_masks({}, TWO_FOUR) == {}
    assert transposable_mask(np.zeros((0, 4, 1, 1), np.float32), TWO_FOUR).shape == (0, 4, 1, 1)


def test_a_models_weights_are_masked_by_name() -> None:
    weights = {"a": weights_of("float32", (4, 8, 3, 3)), "b": weights_of("float32", (16, 4))}
    masks = transposable_masks(weights, TWO_FOUR)
    assert masks.keys() == weights.keys()
    for name, mask in masks.items():
        assert np.array_equal(mask, transposable_mask(weights[name], TWO_FOUR))


def test_all_weights_without_whole_tiles_are_named() -> None:
    weights = {
        "stem.weight": np.ones((64, 3, 7, 7), np.float32),
        "good.weight": np.ones((8, 8, 1, 1), np.float32),
        "head.weight": np.ones((10, 6), np.float32),
        "norm.weight": np.ones(8, np.float32),
    }
    with pytest.raises(InputError, match="3 of 4 weights cannot be cut into tiles of 4x4") as raised:
        transposable_masks(weights, TWO_FOUR)
    found = str(raised.value.found)
    assert "stem.weight (64, 3, 7, 7): C = 3" in found
    assert "head.weight (10, 6): K = 10 and C = 6" in found
    assert "norm.weight (8,): fewer than two axes" in found
    assert "good.weight" not in found
    assert "multiples of 4" in str(raised.value.fix)


def test_an_error_names_the_weight_if_its_name_is_known() -> None:
    with pytest.raises(InputError, match=r"layer1\.conv\.weight \(6, 8\): K = 6"):
        transposable_mask(np.ones((6, 8)), TWO_FOUR, name="layer1.conv.weight")
    with pytest.raises(InputError, match=r"the weight \(8, 8\): K = 8 and C = 8"):
        transposable_mask(np.ones((8, 8)), Pattern(8, 16))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    weights = {"good": np.ones((4, 4), np.float32), "bad": np.ones((8, 4, 3, 3), np.float32)}
    weights["bad"][7, 3, 2, 2] = value
    with pytest.raises(InputError, match="1 of 2 weights contain NaN or infinity") as raised:
        transposable_masks(weights, TWO_FOUR)
    assert raised.value.found == "bad"


@pytest.mark.parametrize("pattern", [Pattern(5, 4), Pattern(0, 4), Pattern(-1, 4), Pattern(1, 0)])
def test_invalid_patterns_are_refused(pattern: Pattern) -> None:
    with pytest.raises(InputError, match="invalid pattern of transposable masks") as raised:
        transposable_mask(np.ones((4, 4)), pattern)
    assert str(pattern) in str(raised.value.found)


def test_without_numba_the_error_says_what_to_install() -> None:
    program = """
import sys
sys.modules["numba"] = sys.modules["torch"] = sys.modules["scipy"] = None
import numpy as np
from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.errors import HostError
from maskplan.pipeline.masking.transposable import transposable_mask
for pattern in (Pattern(2, 4), Pattern(4, 8)):
    try:
        transposable_mask(np.ones((8, 8)), pattern)
    except HostError as error:
        print(error.fix)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["pip install 'maskplan[learn]', or choose magnitude masks"] * 2
