"""Limits of probabilities, against softmax itself."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from maskplan.pipeline.stability.probabilities import (
    l1_limit,
    l2_limit,
    l2_limit_of_norm,
    spread,
    spread_limit,
    total_variation_limit,
)

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
@settings(max_examples=400, deadline=None)
def test_no_limit_is_passed(drawn: tuple[Floats, Floats]) -> None:
    before, after = (log_softmax(each, axis=-1) for each in drawn)
    difference = drawn[1] - drawn[0]
    moved = np.exp(after) - np.exp(before)
    omega = spread(difference)
    tiny = 1e-12
    assert (np.abs(after - before).max(axis=-1) <= omega * ABOVE + tiny).all()
    assert (np.abs(moved).sum(axis=-1) / 2 <= total_variation_limit(omega) * ABOVE + tiny).all()
    assert (np.abs(moved).sum(axis=-1) <= l1_limit(omega) * ABOVE + tiny).all()
    assert (np.linalg.norm(moved, axis=-1) <= l2_limit(difference) * ABOVE + tiny).all()


@given(logits())
@settings(max_examples=200, deadline=None)
def test_the_limits_are_no_looser_than_those_of_the_norms(drawn: tuple[Floats, Floats]) -> None:
    difference = drawn[1] - drawn[0]
    omega, l2 = spread(difference), np.linalg.norm(difference, axis=-1)
    assert omega.shape == l2.shape == (len(difference),)
    assert (omega <= spread_limit(l2) * ABOVE).all()
    assert (l2_limit(difference) <= l2_limit_of_norm(l2) * ABOVE).all()
    np.testing.assert_allclose(l2_limit_of_norm(l2), l2 / 2)
    assert (l1_limit(omega) <= np.abs(difference).max(axis=-1) * ABOVE).all()
    assert (total_variation_limit(omega) <= 1).all()


@given(st.floats(1e-3, 50))
def test_two_classes_at_the_right_odds_attain_the_total_variation(omega: float) -> None:
    before = np.array([-omega / 4, omega / 4])
    difference = np.array([omega / 2, -omega / 2])
    moved = np.exp(log_softmax(before + difference)) - np.exp(log_softmax(before))
    limit = float(total_variation_limit(spread(difference)))
    assert np.abs(moved).sum() / 2 == pytest.approx(limit, rel=1e-9)
    assert float(l1_limit(omega)) == pytest.approx(np.abs(moved).sum(), rel=1e-9)


def test_the_other_limits_are_attained_or_approached() -> None:
    # Two equal classes, a hair apart.
    difference = np.array([1e-4, -1e-4])
    moved = np.exp(log_softmax(difference)) - 0.5
    assert np.linalg.norm(moved) == pytest.approx(float(l2_limit(difference)), rel=1e-6)
    # A class of almost no probability gains all of the spread.
    before = np.array([-40.0, 0.0])
    moved = log_softmax(before + np.array([3.0, 0.0])) - log_softmax(before)
    assert moved[0] == pytest.approx(float(spread([3.0, 0.0])), rel=1e-9)
    assert float(spread([1.0, -1.0, 0.0])) == pytest.approx(float(spread_limit(np.sqrt(2))))


def test_the_same_added_to_all_logits_changes_nothing() -> None:
    difference = np.full((2, 5), 7.0)
    assert not spread(difference).any()
    assert not l2_limit(difference).any()
