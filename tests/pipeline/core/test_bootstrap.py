"""Bootstrap intervals against resampling in plain loops and known coverage."""

from __future__ import annotations

import numpy as np

from maskplan.pipeline.core.bootstrap import paired_interval, ratio_interval


def test_ratio_agrees_with_resampling_by_hand() -> None:
    generator = np.random.default_rng(7)
    numerator, denominator = generator.random(40), generator.random(40) + 0.5
    ratios = []
    for _ in range(4000):
        rows = generator.integers(0, 40, 40)
        ratios.append(numerator[rows].sum() / denominator[rows].sum())
    found = ratio_interval(numerator, denominator)
    assert found is not None
    np.testing.assert_allclose(found, np.percentile(ratios, (2.5, 97.5)), rtol=0.03)


def test_intervals_cover_the_true_mean_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        found = ratio_interval(generator.normal(2.0, 1.0, 60), np.ones(60))
        assert found is not None
        covered += found[0] <= 2.0 <= found[1]
    assert 88 <= covered <= 99


def test_any_function_of_a_set_has_the_interval_of_its_mean() -> None:
    values = np.random.default_rng(5).normal(size=50)
    found, mean = paired_interval(lambda rows: float(values[rows].mean()), 50), ratio_interval(values, np.ones(50))
    assert found is not None
    assert mean is not None
    np.testing.assert_allclose(found, mean, atol=0.05)


def test_what_cannot_be_measured_has_no_interval() -> None:
    assert ratio_interval(np.ones(1), np.ones(1)) is None
    assert ratio_interval(np.ones(3), np.zeros(3)) is None
    assert paired_interval(lambda rows: float("nan") if 0 in rows else 1.0, 5) is None
