"""Histograms count every value once, whatever the order, and never grow."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskplan.calibration.histogram import HALF_BINS, Histogram, union

Floats = npt.NDArray[np.float32]


def histogram_of(*batches: Floats) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    return histogram


def drawn(kind: str, count: int, seed: int) -> Floats:
    normal = np.random.default_rng(seed).standard_normal(count, dtype=np.float32)
    return {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "heavy": normal**5,
        "constant": np.full(count, 3, np.float32),
        "below": np.full(count, -3, np.float32),
        "zeros": np.zeros(count, np.float32),
        "negative": -np.abs(normal) - 1,
    }[kind]


@pytest.mark.parametrize("kind", ["normal", "relu", "heavy", "constant", "below", "zeros", "negative"])
def test_counts_are_numpys_with_the_same_edges(kind: str) -> None:
    values = drawn(kind, 100_000, 0)
    histogram = histogram_of(*np.array_split(values, 7))
    edges = np.arange(-HALF_BINS, HALF_BINS + 1) * histogram.width
    np.testing.assert_array_equal(histogram.counts, np.histogram(values.astype(np.float64), edges)[0])
    assert histogram.count == values.size == histogram.counts.sum()
    assert (histogram.lowest, histogram.highest) == (values.min(), values.max())
    assert histogram.amax == np.abs(values).max()


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 99), exponents=st.lists(st.integers(-30, 30), min_size=1, max_size=5), cut=st.integers(1, 500)
)
def test_neither_order_nor_batches_change_the_counts(seed: int, exponents: list[int], cut: int) -> None:
    values = np.concatenate([drawn("normal", 200, seed + i) * np.float32(2.0**e) for i, e in enumerate(exponents)])
    whole = histogram_of(values)
    parts = histogram_of(*np.array_split(np.sort(np.abs(values)) * np.sign(values[np.argsort(np.abs(values))]), cut))
    np.testing.assert_array_equal(whole.counts, parts.counts)
    assert whole.exponent == parts.exponent
    together = union([histogram_of(values[:cut]), histogram_of(values[cut:])])
    np.testing.assert_array_equal(whole.counts, together.counts)
    assert (whole.count, whole.lowest, whole.highest) == (together.count, together.lowest, together.highest)


def test_the_largest_magnitude_is_in_the_outer_half() -> None:
    for amax in (1e-20, 0.9, 1.0, 1.1, 2.0**15, 3e38):
        histogram = histogram_of(np.array([amax, -amax], np.float32))
        assert HALF_BINS / 2 <= histogram.amax / histogram.width < HALF_BINS


def test_a_histogram_stays_the_size_it_had() -> None:
    histogram = Histogram()
    for exponent in range(-126, 127, 7):
        histogram.update(drawn("normal", 100, exponent + 126) * np.float32(2.0**exponent))
        assert histogram.counts.nbytes == 16 * HALF_BINS


def test_values_of_any_shape_order_and_of_fp16_are_counted() -> None:
    values = drawn("normal", 6000, 1).reshape(10, 20, 30)
    np.testing.assert_array_equal(histogram_of(values).counts, histogram_of(values.transpose(2, 0, 1)).counts)
    half = values.astype(np.float16)
    np.testing.assert_array_equal(histogram_of(half).counts, histogram_of(half.astype(np.float32)).counts)
    assert histogram_of(values[:0]).count == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen_and_stays_seen(bad: float) -> None:
    values = drawn("normal", 100_000, 2)
    values[77_777] = bad
    histogram = histogram_of(values, drawn("normal", 10, 3))
    assert not histogram.finite
    assert not union([Histogram(), histogram]).finite


@pytest.mark.parametrize("kind", ["normal", "relu", "heavy", "constant", "below", "negative"])
@pytest.mark.parametrize("bins", [128, 2048])
def test_spread_is_numpys_histogram_up_to_the_width_of_a_bin(kind: str, bins: int) -> None:
    values = drawn(kind, 100_000, 4)
    histogram = histogram_of(values)
    edges = np.linspace(-histogram.amax, histogram.amax, bins + 1)
    spread = histogram.spread(bins)
    assert spread.sum() == values.size
    # How many values lie below an edge differs by no more than the bin that the edge cuts holds.
    below = np.searchsorted(np.sort(values), edges[1:-1])
    cut = histogram.counts[np.floor(edges[1:-1] / histogram.width).astype(int) + HALF_BINS]
    assert (np.abs(np.cumsum(spread)[:-1] - below) <= cut + 1).all()


def test_spread_is_exact_where_edges_coincide() -> None:
    values = drawn("heavy", 10_000, 5)
    values /= np.abs(values).max()
    expected, _ = np.histogram(values, 2048, range=(-1, 1))
    np.testing.assert_array_equal(histogram_of(values).spread(2048), expected)


def test_magnitudes_count_both_signs() -> None:
    values = drawn("normal", 10_000, 6)
    histogram = histogram_of(values)
    # An edge belongs to the bin above it, and so to the bin of smaller magnitudes where values are negative.
    places = np.floor(values.astype(np.float64) / histogram.width)
    bins = np.where(places < 0, -1 - places, places).astype(int)
    np.testing.assert_array_equal(histogram.magnitudes(), np.bincount(bins, minlength=HALF_BINS))
