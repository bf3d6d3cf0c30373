"""Counts of masks, against counting them one by one and the numbers of the paper."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_counts import diversity, tile_masks, tile_masks_by_paper

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.errors import InputError


@pytest.mark.parametrize(("n", "m"), [(n, m) for m in range(1, 6) for n in range(1, m + 1)])
def test_exact_counts_match_an_exhaustive_search(n: int, m: int) -> None:
    rows = np.array([row for row in itertools.product((0, 1), repeat=m) if sum(row) == n])
    columns = rows
    for _ in range(m - 1):
        columns = (columns[:, None] + rows[None]).reshape(-1, m)
    assert tile_masks(Pattern(n, m)) == np.count_nonzero((columns == n).all(axis=1))


def test_the_known_counts() -> None:
    assert tile_masks(Pattern(2, 4)) == 90
    assert tile_masks(Pattern(3, 6)) == 297_200
    assert tile_masks(Pattern(4, 8)) == 116_963_796_250


@given(m=st.integers(1, 9), data=st.data())
@settings(max_examples=40, deadline=None)
def test_counts_are_symmetric_in_kept_and_dropped(m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m))
    assert tile_masks(Pattern(1, m)) == math.factorial(m)
    assert n == m or tile_masks(Pattern(n, m)) == tile_masks(Pattern(m - n, m))


def test_the_papers_formula_is_too_high() -> None:
    assert tile_masks_by_paper(Pattern(2, 4)) == 24 * 6 == 144
    assert tile_masks_by_paper(Pattern(4, 8)) == 40320 * 5040 * 720 * 120
    # N of the paper is how many are zero: three of four, where one is kept.
    assert tile_masks_by_paper(Pattern(1, 4)) == 24 * 6 * 2
    assert tile_masks_by_paper(Pattern(3, 4)) == 24
    for m in range(1, 9):
        for n in range(1, m + 1):
            assert tile_masks_by_paper(Pattern(n, m)) >= tile_masks(Pattern(n, m))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8)])
@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_logarithms_match_the_exact_integers(n: int, m: int, tiles: int) -> None:
    weights = tiles * m * m
    found = diversity([weights], Pattern(n, m))
    assert found.weights == weights
    for value, count in (
        (found.unstructured, math.comb(weights, weights * n // m)),
        (found.one_axis, math.comb(m, n) ** (weights // m)),
        (found.transposable, tile_masks(Pattern(n, m)) ** tiles),
        (found.transposable_by_paper, tile_masks_by_paper(Pattern(n, m)) ** tiles),
    ):
        # The decimal logarithm of a whole number of any length, by its digits.
        digits = str(count)
        assert value == pytest.approx(len(digits) - 1 + math.log10(float(f"0.{digits}") * 10), rel=1e-9)


def test_exact_counts_reverse_the_papers_order_for_an_8x8_tile() -> None:
    two_four, four_eight = diversity([64], Pattern(2, 4)), diversity([64], Pattern(4, 8))
    assert four_eight.transposable_by_paper > two_four.one_axis > four_eight.transposable > two_four.transposable
    assert two_four.unstructured == four_eight.unstructured > four_eight.one_axis > four_eight.transposable_by_paper
    assert 10**two_four.one_axis == pytest.approx(2.8e12, rel=0.01)
    assert 10**four_eight.one_axis == pytest.approx(5.8e14, rel=0.01)
    assert 10**two_four.unstructured == pytest.approx(1.8e18, rel=0.02)


def test_counts_multiply_over_layers_except_unstructured_ones() -> None:
    sizes = [64, 128, 640]
    parts, whole = [diversity([size], Pattern(4, 8)) for size in sizes], diversity(sizes, Pattern(4, 8))
    assert whole.weights == 832
    for kind in ("one_axis", "transposable", "transposable_by_paper"):
        assert getattr(whole, kind) == pytest.approx(sum(getattr(part, kind) for part in parts), rel=1e-12)
    assert whole.unstructured > sum(part.unstructured for part in parts)


def test_counts_of_a_large_network_are_finite() -> None:
    found = diversity([25_000_000 // 16 * 16], Pattern(2, 4))
    # By Stirling's formula T choose T/2 has about T log10(2) digits.
    assert found.unstructured == pytest.approx(found.weights * math.log10(2), rel=1e-5)


def test_sizes_without_whole_tiles_are_an_error() -> None:
    with pytest.raises(InputError, match="2 of 3 weights do not consist of whole 4x4 tiles") as raised:
        diversity([16, 20, -16], Pattern(2, 4))
    assert raised.value.found == "20, -16"


@pytest.mark.parametrize("pattern", [Pattern(5, 4), Pattern(0, 4)])
def test_invalid_patterns_are_refused(pattern: Pattern) -> None:
    for count in (tile_masks, tile_masks_by_paper, lambda p: diversity([16], p)):
        with pytest.raises(InputError, match="invalid pattern"):
            count(pattern)
