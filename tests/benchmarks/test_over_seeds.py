"""Means over seeds, with intervals that count seeds and images."""

from __future__ import annotations

import numpy as np
import over_seeds
import pytest
from scipy import stats


def row(drop: float, half: float) -> dict[str, object]:
    return {"drop": drop, "drop_ci95": [drop - half, drop + half]}


def test_the_interval_is_that_of_the_images_when_all_seeds_agree() -> None:
    assert over_seeds.mean_drop([row(0.5, 0.4)] * 3) == pytest.approx((0.5, 0.1, 0.9))


def test_the_interval_is_students_when_images_do_not_count() -> None:
    drops = [0.2, 0.9, 0.4, 0.6]
    mean, low, high = over_seeds.mean_drop([row(d, 0.0) for d in drops])
    expected = stats.t.interval(0.95, 3, np.mean(drops), stats.sem(drops))
    assert (mean, low, high) == pytest.approx((np.mean(drops), *expected))


def test_only_groups_of_enough_seeds_are_shown_each_seed_once() -> None:
    runs = [{"model": "a", "seed": s, "rows": {"learned": row(s / 10, 0.1)}} for s in (2, 0, 1, 0)]
    runs += [{"model": "b", "seed": s, "rows": {"learned": row(1.0, 0.1)}} for s in (0, 1)]
    (line,) = over_seeds.mean_lines(runs, ("model",), ("learned",))
    assert line.startswith("| a | learned | +0.00, +0.10, +0.20 | +0.10 | ")


def test_a_row_that_a_seed_lacks_has_no_mean() -> None:
    runs = [{"model": "a", "seed": s, "rows": {"learned": row(0.1, 0.1), "permuted": row(0.1, 0.1)}} for s in range(3)]
    del runs[1]["rows"]["permuted"]  # type: ignore[attr-defined]
    (line,) = over_seeds.mean_lines(runs, ("model",), ("learned", "permuted"))
    assert line.startswith("| a | learned | ")
