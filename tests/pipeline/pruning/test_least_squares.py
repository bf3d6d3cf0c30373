"""Fitted weights against NumPy's least squares on the inputs themselves."""

from __future__ import annotations

import numpy as np
import pytest

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.masking.layerwise import fold_weight, output_error, unfold_weight
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.pruning.least_squares import fit_under_mask

RNG = np.random.default_rng(0)
SHAPE = (5, 8, 3, 1)
INPUTS = np.maximum(RNG.normal(size=(200, 40)) @ RNG.normal(size=(40, 24)), 0)
MOMENT = (INPUTS.T @ INPUTS / 200).astype(np.float32)
WEIGHT = RNG.normal(size=SHAPE).astype(np.float32)
MASK = magnitude_mask(WEIGHT, Pattern(2, 4))


def test_the_fit_is_least_squares_over_the_kept_weights() -> None:
    found = unfold_weight(fit_under_mask(WEIGHT, MASK, MOMENT, damping=0))
    rows, kept = unfold_weight(WEIGHT), unfold_weight(MASK)
    for row, mask, fitted in zip(rows, kept, found, strict=True):
        expected = np.linalg.lstsq(INPUTS[:, mask], INPUTS @ row, rcond=None)[0]
        assert fitted[mask] == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert not fitted[~mask].any()
        assert not np.signbit(fitted[~mask]).any()


def test_damping_pulls_weights_towards_the_old_ones() -> None:
    """The damped fit is the plain one with sqrt(damping * h) more equations a weight."""
    hold = 0.3 * float(np.diagonal(MOMENT).mean())
    found = unfold_weight(fit_under_mask(WEIGHT, MASK, MOMENT, damping=0.3))
    for row, mask, fitted in zip(unfold_weight(WEIGHT), unfold_weight(MASK), found, strict=True):
        more = np.sqrt(200 * hold) * np.eye(int(mask.sum()))
        left = np.vstack([INPUTS[:, mask], more])
        right = np.concatenate([INPUTS @ row, more @ row[mask]])
        assert fitted[mask] == pytest.approx(np.linalg.lstsq(left, right, rcond=None)[0], rel=1e-3, abs=1e-3)
    errors = [
        output_error(WEIGHT - fit_under_mask(WEIGHT, MASK, MOMENT, damping), MOMENT).sum()
        for damping in (0.001, 0.1, 10)
    ]
    assert errors == sorted(errors)
    assert errors[-1] < output_error(np.where(MASK, 0, WEIGHT), MOMENT).sum()


def test_a_full_mask_changes_nothing() -> None:
    found = fit_under_mask(WEIGHT, np.ones(SHAPE, np.bool_), MOMENT)
    assert found == pytest.approx(WEIGHT, abs=1e-4)


def test_rows_may_keep_different_numbers() -> None:
    mask = MASK.copy()
    mask[1] = False
    mask[2, :3] = True
    found = fit_under_mask(WEIGHT, mask, MOMENT)
    assert not found[1].any()
    # A row's fit does not depend on the others.
    for row in range(len(WEIGHT)):
        alone = fit_under_mask(WEIGHT[row : row + 1], mask[row : row + 1], MOMENT)
        assert found[row] == pytest.approx(alone[0], abs=1e-5)


def test_weights_of_zero_inputs_do_not_change() -> None:
    silent = MOMENT.copy()
    silent[:, :4] = silent[:4] = 0
    found = unfold_weight(fit_under_mask(WEIGHT, MASK, silent))
    kept = unfold_weight(MASK)[:, :4]
    assert found[:, :4][kept] == pytest.approx(unfold_weight(WEIGHT)[:, :4][kept], rel=1e-5)
    undamped = unfold_weight(fit_under_mask(WEIGHT, MASK, silent, damping=0))
    assert np.isfinite(undamped).all()
    assert np.array_equal(fold_weight(undamped, SHAPE) != 0, (fold_weight(undamped, SHAPE) != 0) & MASK)
