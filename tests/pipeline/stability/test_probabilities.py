"""Bounds of probabilities, against softmax itself."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from maskplan.pipeline.stability.probabilities import spread, spread_limit, total_variation_limit

Floats = npt.NDArray[np.float64]
ABOVE = 1 + 1e-9


@st.composite
def logits(draw: st.DrawFn) -> tuple[Floats, Floats]:
    """Two sets of logits of up to 50, (images, classes), the second near the first or anywhere."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(1, 5)), draw(st.integers(2, 12)))
    first = random.uniform(-50, 50, shape) * draw(st.sampled_from([1e-3, 0.1, 1.0]))
    second = first + random.uniform(-50, 50, shape) * draw(st.sampled_from([1e-6, 1e-2, 1.0]))
    return first, second


@given(logits())
@settings(max_examples=300, deadline=None)
def test_no_bound_is_exceeded(drawn: tuple[Floats, Floats]) -> None:
    before, after = (log_softmax(each, axis=-1) for each in drawn)
    difference = drawn[1] - drawn[0]
    omega, l2 = spread(difference), np.linalg.norm(difference, axis=-1)
    rounding = 1e-12
    assert omega.shape == l2.shape == (len(difference),)
    assert (omega <= spread_limit(l2) * ABOVE).all()
    assert (np.abs(after - before).max(axis=-1) <= omega * ABOVE + rounding).all()
    variation = np.abs(np.exp(after) - np.exp(before)).sum(axis=-1) / 2
    assert (variation <= total_variation_limit(omega) * ABOVE + rounding).all()
    assert (total_variation_limit(omega) <= 1).all()


@given(st.floats(1e-3, 50))
def test_two_classes_at_the_right_odds_attain_the_total_variation(omega: float) -> None:
    before = np.array([-omega / 4, omega / 4])
    difference = np.array([omega / 2, -omega / 2])
    change = np.exp(log_softmax(before + difference)) - np.exp(log_softmax(before))
    assert np.abs(change).sum() / 2 == pytest.approx(float(total_variation_limit(spread(difference))), rel=1e-9)


def test_the_bounds_of_log_probabilities_and_of_the_spread_are_attained() -> None:
    # A class of almost no probability gains the whole spread.
    before = np.array([-40.0, 0.0])
    change = log_softmax(before + np.array([3.0, 0.0])) - log_softmax(before)
    assert change[0] == pytest.approx(float(spread([3.0, 0.0])), rel=1e-9)
    assert float(spread([1.0, -1.0, 0.0])) == pytest.approx(float(spread_limit(np.sqrt(2))))


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    assert not spread(np.full((2, 5), 7.0)).any()
