"""Statistical limits, against scipy, by hand and by exact coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, binomtest

from maskplan.pipeline.stability.flip_rate import clopper_pearson, flip_rate_limit, quantile_limit


@given(trials=st.integers(1, 60_000), confidence=st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.999999]), data=st.data())
@settings(max_examples=200, deadline=None)
def test_limits_are_scipys(trials: int, confidence: float, data: st.DataObject) -> None:
    successes = data.draw(st.one_of(st.integers(0, trials), st.integers(0, min(trials, 20))))
    expected = binomtest(successes, trials).proportion_ci(confidence, method="exact")
    assert clopper_pearson(successes, trials, confidence) == pytest.approx((expected.low, expected.high), abs=1e-10)
    upper = 1.0 if successes == trials else float(beta.ppf(confidence, successes + 1, trials - successes))
    assert flip_rate_limit(successes, trials, confidence) == pytest.approx(upper, abs=1e-10)


@pytest.mark.parametrize("trials", [2, 8, 1000, 60_000])
def test_limits_of_none_one_and_all_are_what_their_formulas_say(trials: int) -> None:
    least = -math.expm1(math.log1p(-0.025) / trials)
    most = -math.expm1(math.log(0.025) / trials)
    assert clopper_pearson(0, trials) == pytest.approx((0, most), rel=1e-9)
    assert clopper_pearson(trials, trials) == pytest.approx((1 - most, 1), rel=1e-9)
    low, high = clopper_pearson(1, trials)
    assert low == pytest.approx(least, rel=1e-8)
    # P(at most one success) in closed form.
    assert (1 - high) ** trials + trials * high * (1 - high) ** (trials - 1) == pytest.approx(0.025, rel=1e-8)
    assert clopper_pearson(trials - 1, trials) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_a_published_interval_is_reproduced() -> None:
    # 4 of 20 at 95%, as tabled by Clopper and Pearson's method in many texts.
    assert clopper_pearson(4, 20) == pytest.approx((0.0573, 0.4366), abs=5e-5)


@given(st.integers(1, 100_000))
def test_no_flips_among_n_give_at_most_three_in_n(images: int) -> None:
    found = flip_rate_limit(0, images)
    assert found == pytest.approx(1 - 0.05 ** (1 / images), rel=1e-9)
    assert found <= 3 / images


def test_more_flips_or_fewer_images_or_more_confidence_raise_the_limit() -> None:
    limit = flip_rate_limit(3, 1000)
    assert flip_rate_limit(4, 1000) > limit > flip_rate_limit(3, 1001)
    assert flip_rate_limit(3, 1000, 0.99) > limit
    assert clopper_pearson(3, 1000)[1] > limit


@pytest.mark.parametrize("images", [5, 30])
def test_the_flip_rate_is_covered_as_often_as_promised_and_not_much_more(images: int) -> None:
    limits = np.array([flip_rate_limit(flips, images, 0.9) for flips in range(images + 1)])
    coverage = [
        binom.pmf(np.arange(images + 1), images, rate)[limits >= rate].sum() for rate in np.linspace(0.001, 0.999, 999)
    ]
    assert min(coverage) >= 0.9 - 1e-12
    assert min(coverage) < 0.91


@pytest.mark.parametrize(("quantile", "confidence"), [(0.5, 0.95), (0.9, 0.95), (0.95, 0.9), (0.25, 0.99)])
@pytest.mark.parametrize("count", [1, 10, 60, 1000])
def test_a_quantiles_limit_is_the_smallest_order_statistic_that_will_do(
    quantile: float, confidence: float, count: int
) -> None:
    values = np.random.default_rng(0).permutation(count) + 1.0
    # By scipy's distribution: the r-th smallest will do if P(Bin < r) reaches the confidence.
    enough = [r for r in range(1, count + 1) if binom.cdf(r - 1, count, quantile) >= confidence]
    expected = float(enough[0]) if enough else math.inf
    assert quantile_limit(values, quantile, confidence) == expected


def test_too_few_values_give_what_none_can_exceed() -> None:
    assert quantile_limit(np.zeros(58), 0.95, highest=1.0) == 1.0
    assert quantile_limit(np.zeros(59), 0.95, highest=1.0) == 0.0


def test_a_quantile_is_covered_as_often_as_promised() -> None:
    random = np.random.default_rng(1)
    covered = [quantile_limit(random.random(40), 0.8, 0.9) >= 0.8 for _ in range(2000)]
    exact = float(binom.cdf(int(quantile_limit(np.arange(1, 41), 0.8, 0.9)) - 1, 40, 0.8))
    assert exact >= 0.9
    assert np.mean(covered) == pytest.approx(exact, abs=0.03)


def test_ties_only_make_it_surer() -> None:
    # Nine in ten are 0, so the 90% quantile is 0, however the draw falls out.
    random = np.random.default_rng(2)
    draws = (random.random((500, 60)) > 0.9).astype(float)
    assert all(quantile_limit(draw, 0.85) >= 0 for draw in draws)
    assert np.mean([quantile_limit(draw, 0.95) >= 1 for draw in draws]) >= 0.95


@pytest.mark.parametrize(
    ("flips", "images", "confidence"), [(-1, 5, 0.9), (6, 5, 0.9), (0, 0, 0.9), (1, 5, 1.0), (1, 5, 0.0)]
)
def test_what_is_no_proportion_is_refused(flips: int, images: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        flip_rate_limit(flips, images, confidence)
    with pytest.raises(ValueError, match="no proportion"):
        clopper_pearson(flips, images, confidence)


def test_what_has_no_quantile_is_refused() -> None:
    for values, quantile in (([], 0.5), ([1.0, np.nan], 0.5), ([1.0], 1.0), ([1.0], 0.0)):
        with pytest.raises(ValueError, match="no quantile"):
            quantile_limit(values, quantile)
