"""Intervals, against published examples, scipy and exact coverage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln
from scipy.stats import binomtest

from pipeline.intervals import PairedCounts, drop_interval, wilson

counts = st.builds(PairedCounts, *[st.integers(0, 60)] * 4).filter(lambda c: c.images > 0)


@given(trials=st.integers(1, 3000), data=st.data())
@settings(max_examples=150, deadline=None)
def test_wilson_is_scipys(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("level", "z"), [(0.9, 1.6448536269514722), (0.99, 2.5758293035489004)])
def test_wilson_at_other_levels_is_scipys(level: float, z: float) -> None:
    expected = binomtest(17, 50).proportion_ci(level, method="wilson")
    assert wilson(17, 50, z) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [
        # Two culture media on 50 specimens of sputum (Armitage and Berry 1994), as StatsDirect prints the interval.
        ((20, 12, 2, 16), 0.056156, 0.329207),
        # Airway reactivity before and after a transplantation (Fagerland, Lydersen and Laake 2014, table VIII).
        ((1, 1, 7, 12), -0.507, -0.026),
    ],
)
def test_published_examples_are_reproduced(cells: tuple[int, int, int, int], low: float, high: float) -> None:
    digits = 6 if low == 0.056156 else 3
    assert tuple(round(limit / 100, digits) for limit in drop_interval(PairedCounts(*cells))) == (low, high)


def test_drop_is_the_difference_of_accuracies_in_points() -> None:
    c = PairedCounts(70, 10, 4, 16)
    assert c.images == 100
    assert c.drop == pytest.approx(80 - 74)


@given(counts)
@settings(max_examples=200, deadline=None)
def test_the_interval_holds_the_drop_and_lies_within_what_is_possible(c: PairedCounts) -> None:
    low, high = drop_interval(c)
    assert -100 - 1e-9 <= low <= c.drop + 1e-9
    assert c.drop - 1e-9 <= high <= 100 + 1e-9
    assert low < high


@given(counts)
@settings(max_examples=100, deadline=None)
def test_exchanging_the_models_mirrors_the_interval(c: PairedCounts) -> None:
    low, high = drop_interval(c)
    mirrored = drop_interval(PairedCounts(c.both, c.only_second, c.only_first, c.neither))
    assert mirrored == pytest.approx((-high, -low), abs=1e-9)


@given(counts)
@settings(max_examples=100, deadline=None)
def test_a_higher_level_is_a_wider_interval(c: PairedCounts) -> None:
    narrow, wide = drop_interval(c, 1.0), drop_interval(c, 2.5)
    assert wide[0] <= narrow[0] <= narrow[1] <= wide[1]
    assert wide[1] - wide[0] > narrow[1] - narrow[0]


def test_models_that_agree_on_every_image_have_no_drop_but_some_doubt() -> None:
    low, high = drop_interval(PairedCounts(90, 0, 0, 10))
    assert low < 0 < high
    more = drop_interval(PairedCounts(9000, 0, 0, 1000))
    assert more[1] - more[0] < high - low


def test_pairing_narrows_the_interval_of_models_that_err_alike() -> None:
    alike, unlike = PairedCounts(75, 5, 5, 15), PairedCounts(60, 20, 20, 0)
    widths = [high - low for low, high in map(drop_interval, (alike, unlike))]
    assert widths[0] < widths[1]


@pytest.mark.parametrize(
    ("cells", "n"),
    [
        ((0.7, 0.05, 0.05, 0.2), 30),
        ((0.5, 0.2, 0.1, 0.2), 30),
        ((0.85, 0.1, 0.02, 0.03), 30),
        ((0.4, 0.3, 0.1, 0.2), 20),
    ],
)
def test_exact_coverage_is_near_95_percent(cells: tuple[float, ...], n: int) -> None:
    """Summed over every outcome of n images, not sampled."""
    truth = 100 * (cells[1] - cells[2])
    covered = total = 0.0
    for a, b, c in itertools.product(range(n + 1), repeat=3):
        d = n - a - b - c
        if d < 0:
            continue
        outcome = np.array([a, b, c, d])
        chance = float(np.exp(gammaln(n + 1) - gammaln(outcome + 1).sum() + (outcome * np.log(cells)).sum()))
        low, high = drop_interval(PairedCounts(a, b, c, d))
        total += chance
        covered += chance * (low <= truth <= high)
    assert total == pytest.approx(1)
    assert 0.93 <= covered <= 0.995
