"""Random masks, against going through all of them or drawing many."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.masking.patterns import pattern_table
from maskplan.pipeline.stability.random_masks import (
    inclusion,
    norm_deviation,
    output_limit,
    output_moments,
    soft_error_limit,
    soft_gap_limit,
)

Floats = npt.NDArray[np.float64]
TWO_FOUR = pattern_table(Pattern(2, 4))
PATTERNS = [Pattern(2, 4), Pattern(1, 2), Pattern(1, 4), Pattern(3, 4)]


def chances(random: np.random.Generator, *shape: int) -> Floats:
    """Categorical probabilities, some of them zero."""
    drawn = random.random(shape) ** 3 * (random.random(shape) > 0.2)
    drawn[..., 0] += 1e-3
    return drawn / drawn.sum(axis=-1, keepdims=True)


def every_mask(probabilities: Floats, table: npt.NDArray[np.bool_]) -> list[tuple[float, Floats]]:
    """All joint choices of G groups with their probability: masks (G, M)."""
    groups = len(probabilities)
    return [
        (float(np.prod(probabilities[np.arange(groups), list(choice)])), table[list(choice)].astype(float))
        for choice in itertools.product(range(len(table)), repeat=groups)
    ]


@given(st.sampled_from(PATTERNS), st.integers(1, 3), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_mean_and_variance_are_those_over_all_masks(pattern: Pattern, groups: int, seed: int) -> None:
    random, table = np.random.default_rng(seed), pattern_table(pattern)
    terms, probabilities = random.standard_normal((groups, pattern.m)), chances(random, groups, len(table))
    masks = every_mask(probabilities, table)
    outputs = np.array([(mask * terms).sum() for _, mask in masks])
    weights = np.array([weight for weight, _ in masks])
    expected = weights @ outputs
    mean, variance = output_moments(terms, probabilities, table)
    assert mean == pytest.approx(expected)
    assert variance == pytest.approx(weights @ (outputs - expected) ** 2, abs=1e-12)
    kept = sum(weight * mask for weight, mask in masks)
    np.testing.assert_allclose(inclusion(probabilities, table), kept, atol=1e-12)


def test_a_uniform_choice_halves_the_output_and_has_a_third_of_the_spread_as_variance() -> None:
    terms = np.random.default_rng(0).standard_normal((5, 7, 4))
    mean, variance = output_moments(terms, np.full(6, 1 / 6), TWO_FOUR)
    np.testing.assert_allclose(mean, terms.sum(axis=(1, 2)) / 2)
    spread = (terms - terms.mean(axis=-1, keepdims=True)) ** 2
    np.testing.assert_allclose(variance, spread.sum(axis=(1, 2)) / 3)


@given(st.sampled_from(PATTERNS), st.integers(1, 3), st.sampled_from([0.5, 0.9, 0.99]), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_outputs_pass_their_limit_as_seldom_as_promised(
    pattern: Pattern, groups: int, confidence: float, seed: int
) -> None:
    random, table = np.random.default_rng(seed), pattern_table(pattern)
    terms, probabilities = random.standard_normal((groups, pattern.m)), chances(random, groups, len(table))
    mean, _ = output_moments(terms, probabilities, table)
    limit = float(output_limit(terms, table, confidence))
    passed = sum(
        weight for weight, mask in every_mask(probabilities, table) if abs((mask * terms).sum() - mean) > limit
    )
    assert passed <= 1 - confidence


def test_the_limit_of_one_group_is_hoeffdings_of_its_range() -> None:
    # Two patterns of 1:2 with outputs 3 and -1: a range of 4.
    limit = output_limit(np.array([[3.0, -1.0]]), pattern_table(Pattern(1, 2)), 0.9)
    assert 2 * np.exp(-2 * limit**2 / 4**2) == pytest.approx(0.1)
    assert output_limit(np.ones((3, 5, 4)), TWO_FOUR).tolist() == [0, 0, 0]


@given(st.sampled_from(PATTERNS), st.integers(1, 2), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_bernsteins_quantities_are_those_over_all_masks(pattern: Pattern, rows: int, seed: int) -> None:
    random, table = np.random.default_rng(seed), pattern_table(pattern)
    groups = 2 if rows == 1 else 1
    weight = random.standard_normal((rows, groups, pattern.m))
    probabilities = chances(random, rows, groups, len(table))
    masks = every_mask(probabilities.reshape(rows * groups, -1), table)
    kept = inclusion(probabilities, table)
    deviations = [(chance, ((mask.reshape(weight.shape) - kept) * weight)) for chance, mask in masks]
    # Groups are independent and centered, so the sums over them are those of the whole deviation.
    flat = [(chance, each.reshape(rows, -1)) for chance, each in deviations]
    left = sum(chance * each @ each.T for chance, each in flat)
    variances = np.linalg.eigvalsh(left)[-1]
    right = np.linalg.eigvalsh(sum(chance * each.T @ each for chance, each in flat))[-1]
    found = norm_deviation(weight, probabilities, table)
    assert found.variance == pytest.approx(max(variances, right), abs=1e-12)
    longest = max(np.linalg.norm(each, axis=-1).max() for chance, each in deviations if chance > 0)
    assert found.largest == pytest.approx(longest, abs=1e-12)
    assert found.sides == rows + groups * pattern.m
    expected = sum(chance * np.linalg.norm(each, 2) for chance, each in flat)
    assert expected <= found.expected
    for confidence in (0.5, 0.9, 0.99):
        limit = found.limit(confidence)
        assert sum(chance for chance, each in flat if np.linalg.norm(each, 2) > limit) <= 1 - confidence


def test_the_norm_of_a_matrix_under_random_masks_stays_below_its_limits() -> None:
    random = np.random.default_rng(3)
    weight = random.standard_normal((48, 16, 4))
    probabilities = chances(random, 48, 16, 6)
    found, kept = norm_deviation(weight, probabilities, TWO_FOUR), inclusion(probabilities, TWO_FOUR)
    edges = probabilities.cumsum(axis=-1)
    norms = []
    for _ in range(200):
        choice = np.minimum((random.random((48, 16, 1)) > edges).sum(axis=-1), 5)
        norms.append(np.linalg.norm(((TWO_FOUR[choice] - kept) * weight).reshape(48, -1), 2))
    assert np.mean(norms) <= found.expected <= 4 * np.mean(norms)
    assert max(norms) <= found.limit(0.95)
    # The tail inequality holds with equality there.
    limit = found.limit(0.95)
    tail = found.sides * np.exp(-(limit**2) / 2 / (found.variance + found.largest * limit / 3))
    assert tail == pytest.approx(0.05)
    logarithm = np.log(found.sides)
    assert found.expected == pytest.approx(
        np.sqrt(2 * found.variance * logarithm) + found.largest * logarithm / 3, rel=1e-12
    )


@given(st.sampled_from([*PATTERNS, Pattern(4, 8)]), st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_soft_masks_are_no_farther_from_the_likeliest_pattern_than_the_limit(pattern: Pattern, seed: int) -> None:
    random, table = np.random.default_rng(seed), pattern_table(pattern)
    soft, weight = chances(random, 3, 5, len(table)), random.standard_normal((3, 5, pattern.m))
    gaps = inclusion(soft, table) - table[soft.argmax(axis=-1)]
    assert (np.abs(gaps).sum(axis=-1) <= soft_gap_limit(soft, table) + 1e-12).all()
    np.testing.assert_allclose(inclusion(soft, table).sum(axis=-1), pattern.n)
    assert np.linalg.norm(gaps * weight) <= soft_error_limit(weight, soft, table) + 1e-12


def test_the_gap_of_two_four_is_four_times_what_the_likeliest_lacks_and_attained() -> None:
    # Two patterns with nothing in common: {0, 1} and {2, 3}.
    soft = np.array([[0.7, 0, 0, 0, 0, 0.3]])
    gap = np.abs(inclusion(soft, TWO_FOUR) - TWO_FOUR[0]).sum()
    assert soft_gap_limit(soft, TWO_FOUR) == pytest.approx(4 * 0.3) == gap
    assert soft_error_limit(np.full((1, 4), 2.0), np.eye(6)[:1], TWO_FOUR) == 0
