"""Comparison by output against NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from any_network import FunctionEngine

from maskplan.engines.batch_runner import BatchRunner
from maskplan.pipeline.core.artifacts import OutputKind, TensorSpec
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.samples import TensorSamples
from maskplan.pipeline.parity.by_output import NetworkComparison, compare_by_output, require_same_interface

Compute = Callable[[Mapping[str, Any]], list[Any]]
X = TensorSpec("x", "float32", (None, 6))
VALUES = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)


def compared(
    dense: Compute, sparse: Compute, *kinds: OutputKind, spec: TensorSpec = X, samples: TensorSamples | None = None
) -> NetworkComparison:
    outputs = [TensorSpec(kind.name, "float32", ()) for kind in kinds]
    runners = [BatchRunner(FunctionEngine([spec], outputs, compute), "net") for compute in (dense, sparse)]
    data = samples or TensorSamples("val", {"x": VALUES}, {})
    return compare_by_output(runners[0], runners[1], data, kinds, keep=True)


@pytest.mark.parametrize(
    ("dense", "sparse", "same"),
    [
        (("float32", (None, 6)), ("float16", (8, 6)), True),
        (("float32", (None, 6)), ("float32", (None, None)), True),
        (("float32", (None, 6)), ("float32", ()), True),
        (("float32", (None, 6)), ("float32", (None, 7)), False),
        (("float32", (None, 6)), ("float32", (None, 6, 1)), False),
        (("float32", (None, 6)), ("uint8", (None, 6)), False),
        (("int64", (None, 6)), ("int32", (None, 6)), False),
    ],
)
def test_declarations_that_can_be_of_one_network(
    dense: tuple[str, tuple[int | None, ...]], sparse: tuple[str, tuple[int | None, ...]], same: bool
) -> None:
    """The batch and the width of floats are the caller's choice; a shape () may be one that is not declared."""
    for part in ("inputs", "outputs"):
        specs = {name: (TensorSpec("x", *made),) for name, made in (("dense", dense), ("sparse", sparse))}
        first, second = (SimpleNamespace(**{"inputs": (X,), "outputs": (X,), part: specs[n]}) for n in specs)
        if same:
            require_same_interface(first, second, ("a.onnx", "b.onnx"))
        else:
            with pytest.raises(InputError, match=r"x .* of a\.onnx, x .* of b\.onnx"):
                require_same_interface(first, second, ("a.onnx", "b.onnx"))


def noisy(x: np.ndarray, scale: float = 0.1) -> np.ndarray:
    return (x + scale * np.sin(50 * x)).astype(np.float32)


def test_numbers_are_those_of_numpy() -> None:
    found = compared(lambda f: [f["x"]], lambda f: [noisy(f["x"])], OutputKind("y", "logits"))
    (output,) = found.outputs
    a, b = VALUES.astype(np.float64), noisy(VALUES).astype(np.float64)
    power = ((a - b) ** 2).sum() / (a**2).sum()
    assert output.samples == 20
    assert output.relative_error == pytest.approx(np.sqrt(power), rel=1e-5)
    assert output.sqnr_db == pytest.approx(-10 * np.log10(power), rel=1e-5)
    assert output.max_abs_diff == pytest.approx(np.abs(a - b).max(), rel=1e-5)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert output.cosine_min == pytest.approx(cosines.min(), rel=1e-5)
    assert output.agreement == pytest.approx(100 * np.mean(a.argmax(1) == b.argmax(1)))
    assert output.relative_error_ci95 is not None
    assert output.relative_error_ci95[0] < output.relative_error < output.relative_error_ci95[1]


def test_places_of_pixels_agree_along_the_axis_of_classes() -> None:
    def maps(x: np.ndarray) -> np.ndarray:
        return x.reshape(-1, 2, 3)

    found = compared(lambda f: [maps(f["x"])], lambda f: [maps(noisy(f["x"], 1.0))], OutputKind("y", "logits", 2))
    same = maps(VALUES).argmax(2) == maps(noisy(VALUES, 1.0)).argmax(2)
    assert 0 < same.mean() < 1
    assert found.outputs[0].agreement == pytest.approx(100 * same.mean())


def test_whole_runs_keep_the_axis_of_classes() -> None:
    runs = TensorSamples("val", {"x": VALUES.reshape(5, 4, 6)}, {}, one_run_each=True)
    found = compared(lambda f: [f["x"]], lambda f: [noisy(f["x"], 1.0)], OutputKind("y", "logits"), samples=runs)
    same = VALUES.argmax(1) == noisy(VALUES, 1.0).argmax(1)
    assert 0 < same.mean() < 1
    assert found.outputs[0].samples == 5
    assert found.outputs[0].agreement == pytest.approx(100 * same.mean())


def test_equal_minus_infinities_are_left_out() -> None:
    def masked(x: np.ndarray) -> np.ndarray:
        return np.where(np.arange(6) == 2, -np.inf, x)

    found = compared(lambda f: [masked(f["x"])], lambda f: [masked(noisy(f["x"]))], OutputKind("y", "logits"))
    kept = np.arange(6) != 2
    a, b = VALUES[:, kept].astype(np.float64), noisy(VALUES)[:, kept].astype(np.float64)
    assert found.finite
    assert found.outputs[0].relative_error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-5)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_values_that_only_one_side_has_are_not_finite(wrong: float) -> None:
    found = compared(
        lambda f: [f["x"]],
        lambda f: [np.where(f["x"] == VALUES[3, 3], wrong, f["x"]).astype(np.float32)],
        OutputKind("y", "values"),
    )
    assert not found.finite
    assert found.outputs[0].relative_error is None
    assert found.outputs[0].sqnr_db is None


def test_sizes_that_depend_on_the_data_are_compared_sample_by_sample() -> None:
    def positive(f: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return [np.argwhere(f["x"] > 0).astype(np.float32)]

    shifted = compared(positive, lambda f: positive({"x": f["x"] - 0.2}), OutputKind("y", "values"))
    counts, others = (VALUES > 0).sum(1), (VALUES - np.float32(0.2) > 0).sum(1)
    (output,) = shifted.outputs
    assert output.samples == (counts == others).sum()
    assert output.unmatched == (counts != others).sum() > 0
    assert shifted.dense is not None
    rows = shifted.dense.stacked(np.arange(20))["y"]
    assert [len(row) for row in rows] == counts.tolist()


def test_two_rows_by_chance_are_no_batch() -> None:
    """Two results of any number of samples, one to a run of each."""

    def top_two(f: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return [np.sort(f["x"].ravel())[-2:]]

    found = compared(top_two, top_two, OutputKind("y", "values"))
    assert found.outputs[0].samples == 20
    assert found.dense is not None
    np.testing.assert_array_equal(found.dense.rows["y"][4], np.sort(VALUES[4])[-2:])


def test_other_names_are_matched_by_position() -> None:
    kinds = (OutputKind("a", "values"), OutputKind("b", "values"))
    dense = FunctionEngine([X], [TensorSpec(k.name, "float32", ()) for k in kinds], lambda f: [f["x"], 2 * f["x"]])
    sparse = FunctionEngine(
        [TensorSpec("image", "float16", (None, 6))],
        [TensorSpec(name, "float32", ()) for name in ("c", "d")],
        lambda f: [f["image"].astype(np.float32), 2 * f["image"].astype(np.float32)],
    )
    data = TensorSamples("val", {"x": VALUES}, {})
    found = compare_by_output(BatchRunner(dense, "dense"), BatchRunner(sparse, "sparse"), data, kinds)
    for output in found.outputs:
        assert output.relative_error is not None
        assert 0 < output.relative_error < 1e-3
    other = BatchRunner(FunctionEngine([X], [X], lambda f: [f["x"]]), "sparse")
    with pytest.raises(InputError, match="different numbers of outputs"):
        compare_by_output(BatchRunner(dense, "dense"), other, data, kinds)
