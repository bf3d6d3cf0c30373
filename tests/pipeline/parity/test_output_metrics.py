"""Differences of outputs, against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from maskplan.pipeline.parity.output_metrics import compare_outputs

REFERENCE = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
OTHER = (REFERENCE + np.random.default_rng(1).normal(size=(40, 6)) / 50).astype(np.float32)


def test_differences_are_those_of_numpy() -> None:
    found = compare_outputs(REFERENCE, OTHER, "scores")
    a, b = REFERENCE.astype(np.float64), OTHER.astype(np.float64)
    absolute, relative = np.abs(a - b), np.abs(a - b) / np.abs(a)
    for told, values in (("abs", absolute), ("rel", relative)):
        wanted = (values.max(), values.mean(), np.median(values), np.quantile(values, 0.99))
        names = ("max", "mean", "median", "p99")
        assert [getattr(found, f"{name}_{told}") for name in names] == pytest.approx(wanted, rel=1e-4)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert (found.cosine_min, found.cosine_mean) == pytest.approx((cosines.min(), cosines.mean()), abs=1e-6)
    # Polygraphy's peak is the reference's largest value, or 1 where none is positive.
    peak = np.where(a.max(1) > 0, a.max(1), 1)
    decibels = 20 * np.log10(peak) - 10 * np.log10(((a - b) ** 2).mean(1))
    assert found.psnr_min_db == pytest.approx(decibels.min(), abs=1e-3)
    assert (found.name, found.images) == ("scores", 40)


def test_differences_are_taken_against_the_reference_whichever_is_larger() -> None:
    """Twice the reference is off by all of it; half of it is off by half."""
    assert compare_outputs(REFERENCE, 2 * REFERENCE).max_rel == pytest.approx(1)
    assert compare_outputs(REFERENCE, REFERENCE / 2).max_rel == pytest.approx(0.5)


def test_equal_outputs_have_no_difference_and_no_finite_ratio_of_noise() -> None:
    found = compare_outputs(REFERENCE, REFERENCE)
    assert (found.max_abs, found.p99_abs, found.max_rel, found.psnr_min_db) == (0, 0, 0, None)
    assert found.cosine_min == pytest.approx(1)


def test_one_image_far_off_shows_in_the_smallest_and_not_in_the_median() -> None:
    other = REFERENCE.copy()
    other[17] *= -1
    found = compare_outputs(REFERENCE, other)
    assert found.cosine_min == pytest.approx(-1)
    assert found.median_abs == 0
    assert found.max_abs == pytest.approx(2 * np.abs(REFERENCE[17]).max())


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_none_and_never_close(number: float, side: int) -> None:
    sides = [REFERENCE.copy(), OTHER.copy()]
    sides[side][3, 2] = number
    found = compare_outputs(*sides)
    assert found.max_abs is None
    assert found.cosine_min is None or found.cosine_min < 0.99
