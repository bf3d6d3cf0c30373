"""Verdicts of the 2:4 check on single weights of any type, layout and storage, against a slow reference of loops."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from conformance_models import Array, convolutions, model_of, two_of_four
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from maskplan.exporters.conformance import CheckOptions, check_2to4
from maskplan.pipeline.core.choices import CONFORMING, FAIL, PASS, VIOLATING
from maskplan.pipeline.core.reports import WeightVerdict

FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)


def random_sparse(generator: np.random.Generator, shape: tuple[int, ...], axis: int, n: int, m: int) -> Array:
    """Non-zero numbers, exactly N in each group of M along `axis`."""
    values = generator.choice([-1.0, 1.0], shape) * generator.uniform(0.25, 4, shape)
    rows = np.moveaxis(values, axis, -1)
    for index in np.ndindex(*rows.shape[:-1]):
        for start in range(0, rows.shape[-1], m):
            dropped = generator.choice(m, m - n, replace=False)
            rows[index][start + dropped] = 0.0
    return values.astype(np.float32)


@dataclasses.dataclass
class Reference:
    """What a weight's verdict should say, found by loops."""

    groups: int = 0
    violating: int = 0
    negative_zeros: int = 0
    first: tuple[tuple[int, ...], tuple[float, ...]] | None = None


def reference_of(values: Array, axis: int, n: int, m: int, zero: float = 0) -> Reference:
    found = Reference()
    # In the order of storage, so that the first violation met is the first stored.
    for index in itertools.product(*(range(length) for length in values.shape)):
        if float(values[index]) == 0 and math.copysign(1, float(values[index])) < 0:
            found.negative_zeros += 1
        if index[axis] % m:
            continue
        group = tuple(float(values[(*index[:axis], index[axis] + i, *index[axis + 1 :])]) for i in range(m))
        found.groups += 1
        if sum(value != zero for value in group) > n:
            found.violating += 1
            found.first = found.first or (index, group)
    return found


def assert_as(verdict: WeightVerdict, expected: Reference) -> None:
    assert verdict.groups == expected.groups
    assert verdict.violating_groups == expected.violating
    assert verdict.negative_zeros == expected.negative_zeros
    assert (verdict.verdict == VIOLATING) == (expected.violating > 0)
    if expected.first is None:
        assert verdict.first_violation is None
    else:
        assert verdict.first_violation is not None
        assert verdict.first_violation.index == expected.first[0]
        assert np.array_equal(verdict.first_violation.values, expected.first[1], equal_nan=True)


def layer(kind: str, weight: Array) -> onnx.ModelProto:
    if kind == "conv":
        return convolutions(w=weight)
    if kind == "stored transposed":
        nodes = [
            helper.make_node("Transpose", ["w"], ["t"], perm=[3, 2, 0, 1]),
            helper.make_node("Conv", ["x", "t"], ["y"], "node_w"),
        ]
        return model_of(nodes, {"w": weight})
    op = kind.partition(" ")[0]
    attributes = {"transB": 1} if kind == "Gemm transposed" else {}
    return model_of([helper.make_node(op, ["x", "w"], ["y"], "node_w", **attributes)], {"w": weight}, (1, 8))


# How a weight of K outputs and C inputs is stored: its shape, and the axis of C in it.
LAYOUTS: dict[str, Callable[[int, int, int], tuple[tuple[int, ...], int]]] = {
    "conv": lambda k, c, r: ((k, c, r, r + 1), 1),
    "stored transposed": lambda k, c, r: ((r, r + 1, c, k), 2),
    "Gemm": lambda k, c, r: ((c, k), 0),
    "Gemm transposed": lambda k, c, r: ((k, c), 1),
    "MatMul": lambda k, c, r: ((c, k), 0),
    "MatMul batched": lambda k, c, r: ((r, c, k), 1),
}
layouts = st.sampled_from(sorted(LAYOUTS))
sizes = st.integers(1, 3)
# Weights with fewer outputs stay dense.
outputs = st.integers(4, 6)
seeds = st.integers(0, 2**32 - 1)
patterns = st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (2, 8), (4, 4)])


@settings(max_examples=60, deadline=None)
@given(kind=layouts, k=outputs, blocks=sizes, r=st.integers(1, 2), pattern=patterns, seed=seeds)
def test_a_masked_weight_conforms_and_one_more_non_zero_is_found_where_it_is(
    kind: str, k: int, blocks: int, r: int, pattern: tuple[int, int], seed: int
) -> None:
    n, m = pattern
    shape, axis = LAYOUTS[kind](k, blocks * m, r)
    generator = np.random.default_rng(seed)
    weight = random_sparse(generator, shape, axis, n, m)
    options = CheckOptions(pattern=f"{n}:{m}")
    report = check_2to4(layer(kind, weight), options)
    assert (report.verdict, report.reason, report.conforming, report.violating) == (PASS, None, 1, 0)
    assert_as(report.weights[0], reference_of(weight, axis, n, m))
    zeros = np.argwhere(weight == 0)
    if not len(zeros):
        return
    spoilt = tuple(int(i) for i in zeros[generator.integers(len(zeros))])
    weight[spoilt] = 1e-30
    report = check_2to4(layer(kind, weight), options)
    (verdict,) = report.weights
    assert (report.verdict, verdict.verdict, verdict.violating_groups, verdict.axis) == (FAIL, VIOLATING, 1, axis)
    start = (*spoilt[:axis], spoilt[axis] // m * m, *spoilt[axis + 1 :])
    assert verdict.first_violation is not None
    assert verdict.first_violation.index == start
    assert_as(verdict, reference_of(weight, axis, n, m))


@settings(max_examples=60, deadline=None)
@given(
    kind=layouts,
    k=outputs,
    blocks=sizes,
    r=st.integers(1, 2),
    dtype=st.sampled_from((np.float32, np.float16, np.float64)),
    density=st.floats(0.1, 0.9),
    seed=seeds,
)
def test_any_weight_is_judged_as_by_loops(
    kind: str, k: int, blocks: int, r: int, dtype: type, density: float, seed: int
) -> None:
    shape, axis = LAYOUTS[kind](k, 4 * blocks, r)
    generator = np.random.default_rng(seed)
    pool = np.array([1.5, -2.0, 0.125, np.nan, np.inf, np.finfo(dtype).smallest_subnormal], dtype)
    zeros = np.array([0.0, -0.0], dtype)
    weight = np.where(generator.random(shape) < density, generator.choice(pool, shape), generator.choice(zeros, shape))
    (verdict,) = check_2to4(layer(kind, weight.astype(dtype))).weights
    assert_as(verdict, reference_of(weight.astype(dtype), axis, 2, 4))


@pytest.mark.parametrize("dtype", FLOATS)
def test_minus_zero_is_zero_and_counted_and_nan_is_not_zero(dtype: Any) -> None:
    weight = two_of_four(dtype)
    weight[1, 1], weight[2, 2] = -0.0, -0.0
    (verdict,) = check_2to4(convolutions(w=weight)).weights
    assert (verdict.verdict, verdict.negative_zeros, verdict.violating_groups) == (CONFORMING, 2, 0)
    weight[3, 4] = np.nan
    (verdict,) = check_2to4(convolutions(w=weight)).weights
    assert (verdict.verdict, verdict.negative_zeros, verdict.violating_groups) == (VIOLATING, 2, 1)
    assert verdict.first_violation is not None
    assert verdict.first_violation.index == (3, 4, 0, 0)
    assert np.array_equal(verdict.first_violation.values, [np.nan, 2, 2, 0], equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.float32, "float"), (np.float16, "float16"), (ml_dtypes.bfloat16, "bfloat16")]
)
def test_the_verdict_names_the_stored_type(dtype: Any, name: str) -> None:
    (verdict,) = check_2to4(convolutions(w=two_of_four(dtype))).weights
    assert (verdict.dtype, verdict.shape, verdict.axis, verdict.groups) == (name, (4, 8, 1, 1), 1, 8)
    assert (verdict.name, verdict.node, verdict.op) == ("w", "node_w", "Conv")


def quantized(weight: Array, point: Array | None, scale: Array | None = None, before: bool = False) -> onnx.ModelProto:
    """A convolution behind DequantizeLinear; with `before`, of floats behind QuantizeLinear as well."""
    tensors = {"w": weight, "s": np.array(0.5, np.float32) if scale is None else scale}
    rest = ["s"] if point is None else ["s", "z"]
    if point is not None:
        tensors["z"] = point
    attributes = {} if tensors["s"].ndim == 0 else {"axis": 0}
    nodes = [helper.make_node("QuantizeLinear", ["w", *rest], ["q"], **attributes)] if before else []
    nodes += [
        helper.make_node("DequantizeLinear", ["q" if before else "w", *rest], ["d"], **attributes),
        helper.make_node("Conv", ["x", "d"], ["y"], "node_w"),
    ]
    return model_of(nodes, tensors)


@pytest.mark.parametrize(
    ("dtype", "zero"), [(np.int8, 0), (np.int8, -3), (np.uint8, 0), (np.uint8, 128), (ml_dtypes.float8_e4m3fn, 0)]
)
def test_zero_in_a_quantized_weight_is_the_zero_point(dtype: Any, zero: int) -> None:
    weight = two_of_four(dtype, zero)
    (verdict,) = check_2to4(quantized(weight, np.array(zero, dtype))).weights
    assert (verdict.verdict, verdict.violating_groups, verdict.groups) == (CONFORMING, 0, 8)
    weight[2, 1] = 1
    (verdict,) = check_2to4(quantized(weight, np.array(zero, dtype))).weights
    assert (verdict.verdict, verdict.violating_groups) == (VIOLATING, 1)
    assert verdict.first_violation is not None
    assert verdict.first_violation.index == (2, 0, 0, 0)
    assert verdict.first_violation.values == (2, 1, zero, 2)


def test_without_a_zero_point_zero_is_zero() -> None:
    assert check_2to4(quantized(two_of_four(np.int8), None)).passed
    assert not check_2to4(quantized(two_of_four(np.int8, 5), None)).passed


def test_every_channel_has_its_own_zero_point() -> None:
    scales, points = np.full(4, 0.5, np.float32), np.array([5, -7, 0, 5], np.int8)
    weight = np.concatenate([two_of_four(np.int8, zero)[:1] for zero in points])
    assert check_2to4(quantized(weight, points, scales)).passed
    (verdict,) = check_2to4(quantized(weight, np.full(4, 5, np.int8), scales)).weights
    # The second and third channel hold what would be zero elsewhere; all four groups of theirs are full.
    assert (verdict.verdict, verdict.violating_groups) == (VIOLATING, 4)
    assert verdict.first_violation is not None
    assert verdict.first_violation.index == (1, 0, 0, 0)


def test_floats_that_are_quantized_later_are_compared_with_zero() -> None:
    """The zero point speaks of the quantized numbers; 0.0 becomes the zero point, and 3.0 does not."""
    point = np.array(3, np.int8)
    assert check_2to4(quantized(two_of_four(np.float32), point, before=True)).passed
    assert not check_2to4(quantized(two_of_four(np.float32, 3.0), point, before=True)).passed


def test_a_zero_point_in_a_constant_node_counts() -> None:
    model = quantized(two_of_four(np.int8, 5), np.array(5, np.int8))
    (tensor,) = [t for t in model.graph.initializer if t.name == "z"]
    model.graph.node.insert(0, helper.make_node("Constant", [], ["z"], value=tensor))
    model.graph.initializer.remove(tensor)
    assert check_2to4(model).passed


def test_masks_in_the_flat_layout_violate_on_3x3_kernels_and_hold_on_1x1() -> None:
    """The report's groups run along the flattened C*R*S axis, which is not where TensorRT looks."""
    generator = np.random.default_rng(0)
    for kernel, verdict in ((3, VIOLATING), (1, CONFORMING)):
        weight = generator.normal(size=(16, 16, kernel, kernel)).astype(np.float32)
        flat = weight.reshape(16, -1)
        for row in flat:
            for start in range(0, len(row), 4):
                group = row[start : start + 4]
                group[np.argsort(np.abs(group))[:2]] = 0
        report = check_2to4(convolutions(w=weight))
        assert report.weights[0].verdict == verdict
        assert ("flat" in str(report.weights[0].hint)) == (kernel == 3)
        assert_as(report.weights[0], reference_of(weight, 1, 2, 4))
