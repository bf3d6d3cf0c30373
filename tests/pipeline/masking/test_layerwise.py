"""Layer-wise masks compared with all masks of small layers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.masking.layerwise import fold_weight, layerwise_mask, output_error, unfold_weight
from maskplan.pipeline.masking.layerwise_descent import descend
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.masking.patterns import count_violations, pattern_table

TWO_FOUR = Pattern(2, 4)
Floats = npt.NDArray[Any]


def inputs(rng: np.random.Generator, columns: int, *, rows: int = 300, rectified: bool = True) -> Floats:
    """Correlated, as activations are, and mostly positive where a ReLU came before."""
    rank = int(rng.integers(columns, 3 * columns))
    found = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))
    return np.maximum(found, 0) if rectified else found


def moment_of(found: Floats) -> Floats:
    return (found.T @ found / len(found)).astype(np.float32)


def min_error(row: Floats, moment: Floats, pattern: Pattern) -> float:
    """The smallest error of one row over all masks."""
    table = pattern_table(pattern)
    choices = itertools.product(range(len(table)), repeat=len(row) // pattern.m)
    masks = table[np.array(list(choices))].reshape(-1, len(row))
    dropped = np.where(masks, 0, row)
    return float(((dropped @ moment.astype(np.float64)) * dropped).sum(axis=1).min())


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, 2, 4), (2, 4, 4), (2, 4, 3), (1, 4, 4), (3, 4, 3), (2, 3, 3), (1, 3, 4), (2, 2, 3)]),
    rectified=st.booleans(),
)
def test_masks_are_within_two_percent_of_the_optimum(seed: int, shape: tuple[int, int, int], rectified: bool) -> None:
    n, m, groups = shape
    pattern, rng = Pattern(n, m), np.random.default_rng(seed)
    moment = moment_of(inputs(rng, m * groups, rectified=rectified))
    weight = rng.normal(size=(3, m * groups)).astype(np.float32)
    mask = layerwise_mask(weight, moment, pattern, threads=1)
    assert (mask.reshape(3, groups, m).sum(axis=-1) == n).all()
    for row, error in zip(weight, output_error(np.where(mask, 0, weight), moment), strict=True):
        assert error <= 1.02 * min_error(row, moment, pattern) + 1e-9


def test_one_group_is_solved_exactly_at_four_of_eight() -> None:
    rng = np.random.default_rng(5)
    moment = moment_of(inputs(rng, 8))
    weight = rng.normal(size=(4, 8))
    mask = layerwise_mask(weight, moment, Pattern(4, 8))
    found = output_error(np.where(mask, 0, weight), moment)
    assert found == pytest.approx([min_error(row, moment, Pattern(4, 8)) for row in weight])


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), pattern=st.sampled_from([Pattern(2, 4), Pattern(1, 4), Pattern(4, 8)]))
def test_no_row_is_worse_than_its_start(seed: int, pattern: Pattern) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(6, 16, 3, 3)).astype(np.float32)
    moment = moment_of(inputs(rng, 144))
    starts = {
        "magnitude": magnitude_mask(weight, pattern),
        "any": magnitude_mask(rng.normal(size=weight.shape), pattern),
    }
    for start in starts.values():
        before = output_error(np.where(start, 0, weight), moment)
        mask = layerwise_mask(weight, moment, pattern, start=start)
        assert (output_error(np.where(mask, 0, weight), moment) <= before * (1 + 1e-6)).all()
    both = layerwise_mask(weight, moment, pattern)
    before = output_error(np.where(starts["magnitude"], 0, weight), moment)
    assert output_error(np.where(both, 0, weight), moment).sum() < before.sum()


def test_more_restarts_never_raise_the_error() -> None:
    """The error that the search returns is correct, and more restarts never raise it."""
    rng = np.random.default_rng(2)
    rows, table = rng.normal(size=(5, 48)), pattern_table(TWO_FOUR)
    moment = moment_of(inputs(rng, 48))
    starts = rng.integers(0, 6, (1, 5, 12))
    dropped = np.nonzero(~table)[1].reshape(6, 2)
    near = np.array([[h for h in range(12) if h != g][:4] for g in range(12)])
    last = np.full(5, np.inf)
    for restarts in (0, 1, 4, 16, 64):
        choice = np.empty((5, 12), np.int64)
        errors = descend(rows, moment, starts, table, dropped, near, restarts, 7, choice)
        true = output_error(np.where(table[choice].reshape(5, 48), 0, rows), moment)
        assert errors == pytest.approx(true, rel=1e-6)
        assert (errors <= last + 1e-12).all()
        last = errors


def test_the_moments_columns_are_taps_of_channels() -> None:
    """A channel whose inputs are zero is dropped at every tap, however large its weights."""
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(8, 8, 3, 2)).astype(np.float32)
    silent = (1, 2, 4, 7)
    weight[:, silent] *= 100
    columns = inputs(rng, 48, rectified=False).reshape(-1, 3, 2, 8)
    columns[..., silent] = 0
    mask = layerwise_mask(weight, moment_of(columns.reshape(-1, 48)), TWO_FOUR)
    assert not mask[:, silent].any()
    assert mask[:, [0, 3, 5, 6]].all()
    assert count_violations(mask, TWO_FOUR) == 0


def test_folding_is_the_inverse_of_unfolding() -> None:
    weight = np.arange(2 * 4 * 3 * 2).reshape(2, 4, 3, 2)
    rows = unfold_weight(weight)
    assert rows[1, (2 * 2 + 1) * 4 + 3] == weight[1, 3, 2, 1]
    assert np.array_equal(fold_weight(rows, weight.shape), weight)


def test_existing_zeros_are_dropped_first() -> None:
    rng = np.random.default_rng(4)
    weight = rng.normal(size=(16, 16)).astype(np.float32)
    free = rng.permuted(np.tile([True, True, False, False], (16, 4)).reshape(16, 4, 4), axis=-1).reshape(16, 16)
    weight[free] = 0
    mask = layerwise_mask(weight, moment_of(inputs(rng, 16)), TWO_FOUR)
    assert np.array_equal(mask, ~free)


def test_masks_do_not_depend_on_threads_or_scale() -> None:
    rng = np.random.default_rng(6)
    weight = rng.normal(size=(40, 16, 3, 3)).astype(np.float32)
    moment = moment_of(inputs(rng, 144))
    mask = layerwise_mask(weight, moment, TWO_FOUR, threads=1)
    assert np.array_equal(mask, layerwise_mask(weight, moment, TWO_FOUR, threads=3))
    small = weight.astype(np.float64) * 2.0**-500
    assert np.array_equal(mask, layerwise_mask(small, moment, TWO_FOUR, threads=3))


@pytest.mark.parametrize(
    ("weight", "pattern", "message"),
    [
        (np.ones((4, 6, 3, 3)), TWO_FOUR, "no groups of 4 along C"),
        (np.ones((4, 8)), Pattern(5, 4), "invalid pattern of layer-wise masks"),
        (np.full((4, 8), np.nan), TWO_FOUR, "weights of the weight contain NaN"),
        (np.ones((4, 4)), TWO_FOUR, "second moments do not fit the weight"),
        (np.ones((4, 32)), Pattern(16, 32), "compare all patterns"),
    ],
)
def test_weights_that_cannot_be_masked_are_an_error(weight: Floats, pattern: Pattern, message: str) -> None:
    columns = 8 if weight.shape == (4, 4) else int(np.prod(weight.shape[1:]))
    with pytest.raises(InputError, match=message):
        layerwise_mask(weight, np.eye(columns, dtype=np.float32), pattern)


def test_moments_that_are_not_finite_are_an_error() -> None:
    moment = np.eye(8, dtype=np.float32)
    moment[0, 0] = np.inf
    with pytest.raises(InputError, match="inputs on these images of conv contain NaN or infinity"):
        layerwise_mask(np.ones((4, 8)), moment, TWO_FOUR, name="conv")
