"""Statistical limits, against scipy, by hand and by exact coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from maskplan.pipeline.stability.flip_rate import flip_rate_limit, quantile_limit


@given(st.integers(1, 100_000))
def test_no_flips_among_n_give_at_most_three_in_n(images: int) -> None:
    found = flip_rate_limit(0, images)
    assert found == pytest.approx(1 - 0.05 ** (1 / images), rel=1e-9)
    assert found <= 3 / images


def test_more_flips_or_fewer_images_or_more_confidence_raise_the_limit() -> None:
    limit = flip_rate_limit(3, 1000)
    assert flip_rate_limit(4, 1000) > limit > flip_rate_limit(3, 1001)
    assert flip_rate_limit(3, 1000, 0.99) > limit


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


def test_invalid_quantiles_are_refused() -> None:
    for values, quantile in (([], 0.5), ([1.0, np.nan], 0.5), ([1.0], 1.0), ([1.0], 0.0)):
        with pytest.raises(ValueError, match="no quantile"):
            quantile_limit(values, quantile)
