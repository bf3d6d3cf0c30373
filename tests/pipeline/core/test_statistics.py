"""Intervals, against published examples, scipy and exact coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln
from scipy.stats import beta, binomtest

from maskplan.pipeline.core.statistics import (
    PairedCounts,
    best_drop_limit,
    clopper_pearson,
    clopper_pearson_upper,
    drop_interval,
    mcnemar_p,
    min_images,
    wilson,
)

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


@pytest.mark.parametrize(
    ("rates", "n"),
    [
        ((0.7, 0.05, 0.05, 0.2), 200),
        ((0.6, 0.1, 0.02, 0.28), 200),
        ((0.7, 0.05, 0.05, 0.2), 1000),
        ((0.9, 0.02, 0.005, 0.075), 2000),
        ((0.95, 0.004, 0.004, 0.042), 5000),
    ],
)
def test_simulated_coverage_of_the_drop_and_of_the_flip_rate(rates: tuple[float, ...], n: int) -> None:
    """2,000 drawn data sets each: Newcombe's interval holds the true drop in about 95%, the exact one in no less."""
    drawn = np.random.default_rng(7).multinomial(n, rates, 2000).tolist()
    drop, flips = 100 * (rates[1] - rates[2]), rates[1] + rates[2]
    drops = [drop_interval(PairedCounts(*cells)) for cells in drawn]
    covered = np.mean([low <= drop <= high for low, high in drops])
    assert 0.935 <= covered <= 0.985
    changed = [cells[1] + cells[2] for cells in drawn]
    limits = {count: clopper_pearson(count, n, 0.95) for count in set(changed)}
    exact = [limits[count] for count in changed]
    assert 0.94 <= np.mean([low <= flips <= high for low, high in exact]) <= 0.995
    # What `--use-ci` promises is the bad end alone: it is below the truth in at most about 2.5%.
    assert np.mean([high < drop for _, high in drops]) <= 0.035
    assert np.mean([high < flips for _, high in exact]) <= 0.035


@given(trials=st.integers(1, 60_000), confidence=st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.999999]), data=st.data())
@settings(max_examples=200, deadline=None)
def test_clopper_pearson_matches_scipy(trials: int, confidence: float, data: st.DataObject) -> None:
    successes = data.draw(st.one_of(st.integers(0, trials), st.integers(0, min(trials, 20))))
    expected = binomtest(successes, trials).proportion_ci(confidence, method="exact")
    assert clopper_pearson(successes, trials, confidence) == pytest.approx((expected.low, expected.high), abs=1e-10)
    upper = 1.0 if successes == trials else float(beta.ppf(confidence, successes + 1, trials - successes))
    assert clopper_pearson_upper(successes, trials, confidence) == pytest.approx(upper, abs=1e-10)


@pytest.mark.parametrize("trials", [2, 8, 1000, 60_000])
def test_clopper_pearson_of_none_one_and_all_matches_the_closed_forms(trials: int) -> None:
    lowest = -math.expm1(math.log1p(-0.025) / trials)
    highest = -math.expm1(math.log(0.025) / trials)
    assert clopper_pearson(0, trials) == pytest.approx((0, highest), rel=1e-9)
    assert clopper_pearson(trials, trials) == pytest.approx((1 - highest, 1), rel=1e-9)
    low, high = clopper_pearson(1, trials)
    assert low == pytest.approx(lowest, rel=1e-8)
    # P(at most one success) in closed form.
    assert (1 - high) ** trials + trials * high * (1 - high) ** (trials - 1) == pytest.approx(0.025, rel=1e-8)
    assert clopper_pearson(trials - 1, trials) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_a_published_clopper_pearson_interval_is_reproduced() -> None:
    # 4 of 20 at 95%, as tabled by Clopper and Pearson's method in many texts.
    assert clopper_pearson(4, 20) == pytest.approx((0.0573, 0.4366), abs=5e-5)


@pytest.mark.parametrize(
    ("successes", "trials", "confidence"), [(-1, 5, 0.9), (6, 5, 0.9), (0, 0, 0.9), (1, 5, 1.0), (1, 5, 0.0)]
)
def test_an_impossible_proportion_is_refused(successes: int, trials: int, confidence: float) -> None:
    for interval in (clopper_pearson, clopper_pearson_upper):
        with pytest.raises(ValueError, match="no proportion"):
            interval(successes, trials, confidence)


@given(st.integers(0, 400), st.integers(0, 400))
@settings(max_examples=100, deadline=None)
def test_mcnemars_test_is_the_exact_test_of_a_fair_coin(lost: int, gained: int) -> None:
    expected = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar_p(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_mcnemars_test_of_many_images_neither_overflows_nor_takes_long() -> None:
    assert mcnemar_p(24_800, 25_200) == pytest.approx(binomtest(24_800, 50_000).pvalue, rel=1e-6)
    assert mcnemar_p(0, 50_000) == 0
    assert mcnemar_p(50_000, 50_000) == 1


def test_the_best_limit_is_that_of_models_that_agree_everywhere() -> None:
    assert best_drop_limit(200, 0.9) == drop_interval(PairedCounts(180, 0, 0, 20))[1]
    assert best_drop_limit(20_000, 0.9) < best_drop_limit(200, 0.9) / 10


@pytest.mark.parametrize("threshold", [1, 2, 3, 4, 7, 8, 9, 1000, 123_457])
def test_the_fewest_images_are_found(threshold: int) -> None:
    asked: list[int] = []

    def suffices(n: int) -> bool:
        asked.append(n)
        return n >= threshold

    assert min_images(suffices) == threshold
    assert len(asked) < 60


def test_what_never_suffices_has_no_number() -> None:
    assert min_images(lambda n: False) is None
    assert min_images(lambda n: n >= 5000, max_images=1000) is None
