"""The magnitude mask: keep the N largest of each group."""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt

from pipeline.artifacts import Pattern
from pipeline.masking.patterns import CHANNEL, FLAT, group, ungroup


def magnitude_mask(weight: npt.NDArray[np.floating], pattern: Pattern, layout: str = CHANNEL) -> npt.NDArray[np.bool_]:
    """Keep the N largest magnitudes in each group of M.

    Args:
        weight: (K, C, R, S) or (K, C); finite.
        pattern: N:M.
        layout: See `patterns.group`.

    Returns:
        Bool mask shaped like `weight`, exactly N true in each group. Ties keep the lower index.
    """
    groups = group(np.abs(weight), pattern.m, layout, pad=layout == FLAT)
    # An element's rank is how many of its group come before it; counting pairs beats sorting for so few.
    rank = np.zeros(groups.shape, dtype=np.uint8)
    for i in range(pattern.m):
        for j in range(i + 1, pattern.m):
            later_wins = groups[..., j] > groups[..., i]
            rank[..., i] += later_wins
            rank[..., j] += ~later_wins
    return cast(npt.NDArray[np.bool_], ungroup(rank < pattern.n, weight.shape, layout))


def kept_magnitude(weight: npt.NDArray[np.floating], mask: npt.NDArray[np.bool_]) -> float:
    """Share of a weight's absolute sum that a mask keeps, 0 to 1; 1 for a weight of zeros."""
    magnitude = np.abs(weight)
    total = float(magnitude.sum(dtype=np.float64))
    return float(magnitude.sum(dtype=np.float64, where=mask)) / total if total else 1.0
