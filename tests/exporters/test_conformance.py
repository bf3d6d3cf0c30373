"""The 2:4 check against a slow reference of loops, on many ways to store a weight, and on files that are not ONNX."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.conformance import CheckOptions, check_2to4
from maskplan.exporters.metadata import write_provenance
from maskplan.pipeline.core.artifacts import Preprocessing, Provenance
from maskplan.pipeline.core.choices import CONFORMING, DENSE_BY_CHOICE, FAIL, INELIGIBLE, PASS, VIOLATING
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.reports import WeightVerdict

Array = npt.NDArray[Any]

FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)


def model_of(
    nodes: Sequence[onnx.NodeProto], tensors: dict[str, Array], x: Sequence[int] = (1, 8, 4, 4)
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def convolutions(**weights: Array) -> onnx.ModelProto:
    """Convolutions in a row, each named after its weight."""
    names = list(weights)
    tensors = ["x", *(f"after_{n}" for n in names[:-1]), "y"]
    nodes = [
        helper.make_node("Conv", [tensors[i], name], [tensors[i + 1]], f"node_{name}") for i, name in enumerate(names)
    ]
    return model_of(nodes, weights)


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
seeds = st.integers(0, 2**32 - 1)
patterns = st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (2, 8), (4, 4)])


@settings(max_examples=60, deadline=None)
@given(kind=layouts, k=sizes, blocks=sizes, r=st.integers(1, 2), pattern=patterns, seed=seeds)
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
    k=sizes,
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


def two_of_four(dtype: Any, zero: float = 0.0) -> Array:
    """(4, 8, 1, 1): exactly two numbers other than `zero` in each group."""
    weight = np.full((4, 8, 1, 1), zero, dtype)
    weight[:, [0, 3, 5, 6]] = 2
    return weight


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


def test_floats_that_are_quantized_later_are_held_against_zero() -> None:
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


DENSE = np.ones((8, 8, 1, 1), np.float32)
SPARSE = np.tile(two_of_four(np.float32), (2, 1, 1, 1))


def provenance(masked: tuple[str, ...]) -> Provenance:
    how = Preprocessing(8, 4, 4, 0, "bilinear", (0.0,) * 8, (1.0,) * 8)
    return Provenance("net", True, "test", "0" * 64, 8, (), how, masked, "2:4", "channel", "magnitude")


def three(masked: tuple[str, ...] | None = None, **changed: Array) -> onnx.ModelProto:
    """Two sparse weights and a dense one between them, with the list of masked weights in the metadata."""
    model = convolutions(**{"a": SPARSE, "b": DENSE, "c": SPARSE, **changed})
    if masked is not None:
        write_provenance(model, provenance(masked))
    return model


def verdicts(model: onnx.ModelProto, **options: Any) -> tuple[str, dict[str, str]]:
    report = check_2to4(model, CheckOptions(**options))
    counts = [report.conforming, report.violating, report.dense_by_choice, report.ineligible]
    names = [CONFORMING, VIOLATING, DENSE_BY_CHOICE, INELIGIBLE]
    assert counts == [sum(w.verdict == name for w in report.weights) for name in names]
    assert report.eligible == sum(counts[:3])
    assert (report.reason is None) == (report.verdict == PASS)
    return report.verdict, {w.name: w.verdict for w in report.weights}


def test_without_a_list_every_eligible_weight_must_conform() -> None:
    expected = {"a": CONFORMING, "b": VIOLATING, "c": CONFORMING}
    assert verdicts(three()) == (FAIL, expected)
    assert verdicts(three(masked=())) == (FAIL, expected)


def test_with_a_list_the_others_are_dense_by_choice() -> None:
    expected = {"a": CONFORMING, "b": DENSE_BY_CHOICE, "c": CONFORMING}
    assert verdicts(three(masked=("a", "c"))) == (PASS, expected)
    assert verdicts(three(), masked=("a", "c")) == (PASS, expected)


def test_a_list_given_overrules_the_files_own() -> None:
    assert verdicts(three(masked=("a", "b")), masked=("a", "c"))[0] == PASS
    assert verdicts(three(masked=("a", "c")), masked=("a", "b"))[0] == FAIL


def test_a_listed_weight_that_violates_fails() -> None:
    expected = {"a": CONFORMING, "b": VIOLATING, "c": DENSE_BY_CHOICE}
    assert verdicts(three(masked=("a", "b"))) == (FAIL, expected)


def test_strict_demands_every_eligible_weight() -> None:
    expected = {"a": CONFORMING, "b": VIOLATING, "c": CONFORMING}
    assert verdicts(three(masked=("a", "c")), strict=True) == (FAIL, expected)
    assert verdicts(three(masked=("a", "c"), b=SPARSE), strict=True)[0] == PASS


@pytest.mark.parametrize("glob", ["b", "?", "[b]"])
@pytest.mark.parametrize("strict", [False, True])
def test_what_may_be_dense_does_not_fail_and_what_conforms_still_counts(glob: str, strict: bool) -> None:
    expected = {"a": CONFORMING, "b": DENSE_BY_CHOICE, "c": CONFORMING}
    assert verdicts(three(), strict=strict, allow_dense=(glob,)) == (PASS, expected)


def test_a_glob_that_matches_nothing_excuses_nothing() -> None:
    assert verdicts(three(), allow_dense=("B", "bb", "node_b"))[0] == FAIL


def test_a_masked_weight_may_be_excused_too() -> None:
    """Who lets a weight be dense means it, whether or not the file lists it."""
    expected = {"a": CONFORMING, "b": DENSE_BY_CHOICE, "c": CONFORMING}
    assert verdicts(three(masked=("a", "b", "c")), allow_dense=("b",)) == (PASS, expected)


def test_a_masked_weight_that_is_not_in_the_file_fails() -> None:
    report = check_2to4(three(masked=("a", "gone", "c", "lost")))
    assert report.verdict == FAIL
    assert "gone" in str(report.reason)
    assert "2" in str(report.reason)


def test_a_masked_weight_that_became_ineligible_fails() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["m"]),
        helper.make_node("Conv", ["m", "g"], ["y"], group=2),
    ]
    model = model_of(nodes, {"a": SPARSE, "g": np.zeros((8, 4, 1, 1), np.float32)})
    report = check_2to4(model, CheckOptions(masked=("a", "g")))
    assert report.verdict == FAIL
    assert "g" in str(report.reason).split()
    assert check_2to4(model, CheckOptions(masked=("a",))).passed


@pytest.mark.parametrize(
    ("weight", "attributes"),
    [((8, 3, 1, 1), {}), ((8, 1, 3, 3), {"group": 8})],
    ids=["three channels", "depthwise"],
)
def test_a_file_without_an_eligible_weight_fails(weight: tuple[int, ...], attributes: dict[str, int]) -> None:
    model = model_of([helper.make_node("Conv", ["x", "w"], ["y"], **attributes)], {"w": np.zeros(weight, np.float32)})
    report = check_2to4(model)
    assert (report.verdict, report.reason, report.eligible, report.ineligible) == (
        FAIL,
        "no weight is eligible",
        0,
        1,
    )


def test_a_file_without_weights_fails() -> None:
    report = check_2to4(model_of([helper.make_node("Relu", ["x"], ["y"])], {}))
    assert (report.verdict, report.reason, report.weights) == (FAIL, "no weight is eligible", ())


def test_excusing_every_weight_does_not_pass() -> None:
    assert check_2to4(convolutions(a=DENSE), CheckOptions(allow_dense=("*",))).verdict == FAIL


def test_an_ineligible_weight_says_why_and_is_not_looked_into() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "stem"], ["a"], "stem"),
        helper.make_node("Conv", ["a", "deep"], ["b"], "deep", group=8),
        helper.make_node("ConvTranspose", ["b", "up"], ["c"], "up"),
        helper.make_node("Mul", ["k", "k"], ["computed"]),
        helper.make_node("Conv", ["c", "computed"], ["d"], "made"),
        helper.make_node("Conv", ["d", "good"], ["y"], "good"),
    ]
    tensors = {
        "stem": np.ones((8, 3, 1, 1), np.float32),
        "deep": np.ones((8, 1, 1, 1), np.float32),
        "up": np.ones((8, 8, 1, 1), np.float32),
        "k": DENSE,
        "good": SPARSE,
    }
    report = check_2to4(model_of(nodes, tensors))
    assert report.verdict == PASS
    assert {w.node: (w.verdict, w.reason, w.axis, w.groups) for w in report.weights} == {
        "stem": (INELIGIBLE, "channels_not_multiple_of_4", None, 0),
        "deep": (INELIGIBLE, "grouped", None, 0),
        "up": (INELIGIBLE, "unsupported_op", None, 0),
        "made": (INELIGIBLE, "not_constant", None, 0),
        "good": (CONFORMING, None, 1, 16),
    }


def test_a_weight_in_a_branch_is_judged_too() -> None:
    for own, verdict in ((SPARSE, PASS), (DENSE, FAIL)):
        branches = {
            f"{name}_branch": helper.make_graph(
                [helper.make_node("Conv", ["x", weight], [f"{name}_out"], name)],
                name,
                [],
                [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)],
                [numpy_helper.from_array(own, "own")] if weight == "own" else [],
            )
            for name, weight in (("then", "outer"), ("else", "own"))
        }
        model = model_of(
            [helper.make_node("If", ["flag"], ["y"], **branches)], {"outer": SPARSE, "flag": np.array(True)}
        )
        report = check_2to4(model)
        assert (report.verdict, {w.name for w in report.weights}) == (verdict, {"outer", "own"})


def test_a_weight_used_twice_is_judged_along_the_axis_of_each_use() -> None:
    """Conforming along the rows and violating along the columns."""
    weight = np.zeros((8, 8), np.float32)
    weight[:, [0, 5]] = 1
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["a"], "rows", transB=1),
        helper.make_node("Gemm", ["a", "w"], ["y"], "columns"),
    ]
    report = check_2to4(model_of(nodes, {"w": weight}, (1, 8)), CheckOptions(masked=("w",)))
    assert {w.node: w.verdict for w in report.weights} == {"rows": CONFORMING, "columns": VIOLATING}
    assert (report.verdict, report.eligible) == (FAIL, 2)


@pytest.mark.parametrize(
    ("shape", "likely"), [((256, 256, 1, 1), True), ((252, 256, 1, 1), False), ((256, 252, 3, 3), False)]
)
def test_only_wide_layers_are_likely_to_win(shape: tuple[int, ...], likely: bool) -> None:
    (verdict,) = check_2to4(convolutions(w=np.zeros(shape, np.float32))).weights
    assert verdict.likely_speedup is likely


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


def saved(folder: Path, model: onnx.ModelProto, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def external(folder: Path, weight: Array, location: str, data: bytes | None = None) -> Path:
    """A file whose weight lies in `location`, relative to it; `data` is what lies there, nothing if None."""
    model = convolutions(w=weight)
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(weight.nbytes))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    if data is not None:
        (folder / location).write_bytes(data)
    return saved(folder, model)


def test_external_data_beside_the_file_is_read(tmp_path: Path) -> None:
    assert check_2to4(external(tmp_path, SPARSE, "w.bin", SPARSE.tobytes())).passed
    report = check_2to4(external(tmp_path, DENSE, "w.bin", DENSE.tobytes()))
    assert report.weights[0].violating_groups == 16


@pytest.mark.parametrize("kind", ["above", "absolute", "link"])
def test_external_data_outside_the_folder_is_refused(kind: str, tmp_path: Path) -> None:
    outside, inside = tmp_path / "secret.bin", tmp_path / "inside"
    inside.mkdir()
    outside.write_bytes(SPARSE.tobytes())
    if kind == "link":
        (inside / "w.bin").symlink_to(outside)
    location = {"above": "../secret.bin", "absolute": str(outside), "link": "w.bin"}[kind]
    path = external(inside, SPARSE, location)
    with pytest.raises(InputError, match="cannot be read"):
        check_2to4(path)


@pytest.mark.parametrize("data", [None, b"", SPARSE.tobytes()[:-1]], ids=["missing", "empty", "short"])
def test_external_data_that_is_not_all_there_is_refused(data: bytes | None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        check_2to4(external(tmp_path, SPARSE, "w.bin", data))


def test_a_tensor_with_too_few_bytes_is_refused(tmp_path: Path) -> None:
    model = convolutions(w=SPARSE)
    model.graph.initializer[0].raw_data = SPARSE.tobytes()[:-4]
    with pytest.raises(InputError, match="cannot be read"):
        check_2to4(saved(tmp_path, model))


@pytest.mark.parametrize(
    "data",
    [b"", b"not an ONNX file\n", b"\x89PNG\r\n\x1a\n" + bytes(64), bytes(100), b"<html><body>404</body></html>"],
    ids=["empty", "text", "png", "zeros", "html"],
)
def test_a_file_that_is_not_onnx_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(InputError, match="not an ONNX file"):
        check_2to4(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = convolutions(w=SPARSE).SerializeToString()
    path = tmp_path / "model.onnx"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            check_2to4(path)
    path.write_bytes(whole)
    assert check_2to4(path).passed


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(InputError):
            check_2to4(path)


# The command.


def test_the_command_says_yes_no_and_why(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    good, bad = saved(tmp_path, three(masked=("a", "c"))), saved(tmp_path, three(), "bad.onnx")
    ran = cli("check", good, "--report", tmp_path / "good.json")
    assert ran.code == 0
    assert "pass: 2 conforming, 0 violating, 1 dense by choice, 0 ineligible" in ran.out
    ran = cli("check", bad, "--report", tmp_path / "bad.json")
    assert ran.code == 1
    assert "16 of 16 groups, first at [0, 0, 0, 0]" in " ".join(ran.out.split())
    assert ran.err.startswith("failed: ")
    for name, verdict in (("good", PASS), ("bad", FAIL)):
        report = json.loads((tmp_path / f"{name}.json").read_text())
        assert report["verdict"] == verdict
        assert {"eligible", "conforming", "violating", "dense_by_choice", "ineligible", "weights"} <= set(report)
        fields = {"name", "node", "op", "shape", "axis", "dtype", "verdict", "reason", "groups"}
        fields |= {"violating_groups", "negative_zeros", "first_violation", "likely_speedup"}
        assert all(fields <= set(w) for w in report["weights"])
    (weight,) = [w for w in report["weights"] if w["verdict"] == VIOLATING]
    assert weight["first_violation"] == {"index": [0, 0, 0, 0], "values": [1, 1, 1, 1]}


def test_the_command_takes_its_list_from_a_mask_file(cli: Callable[..., Any], tmp_path: Path) -> None:
    model = saved(tmp_path, three())
    for names, code in ((("a", "c"), 0), (("a", "b"), 1), (("a", "elsewhere"), 1)):
        masks = tmp_path / "masks.safetensors"
        safetensors.numpy.save_file(dict.fromkeys(names, SPARSE != 0), masks)
        assert cli("check", model, "--masks", masks).code == code
    assert cli("check", model, "--masks", tmp_path / "none.safetensors").code == 3


def test_the_commands_switches_reach_the_check(cli: Callable[..., Any], tmp_path: Path) -> None:
    listed = saved(tmp_path, three(masked=("a", "c")))
    assert cli("check", listed, "--strict").code == 1
    assert cli("check", listed, "--strict", "--allow-dense", "b").code == 0
    assert cli("check", listed, "--strict", "--allow-dense", "x*", "--allow-dense", "b*").code == 0
    assert cli("check", listed, "--pattern", "1:4").code == 1
    assert cli("check", listed, "--pattern", "4:4", "--strict").code == 0
    for pattern in ("2-4", "5:4", "0:4", ""):
        ran = cli("check", listed, "--pattern", pattern)
        assert (ran.code, ran.err.splitlines()[0]) == (3, "error: not an N:M pattern")


def test_the_command_refuses_what_is_not_onnx(cli: Callable[..., Any], tmp_path: Path) -> None:
    path, report = tmp_path / "model.onnx", tmp_path / "report.json"
    path.write_bytes(b"no model at all")
    for model in (path, tmp_path / "missing.onnx"):
        ran = cli("check", model, "--report", report)
        assert (ran.code, ran.out) == (3, "")
        assert ran.err.startswith("error: ")
        assert "Traceback" not in ran.err
        assert not report.exists()
