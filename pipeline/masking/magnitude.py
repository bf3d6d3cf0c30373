"""The magnitude mask: keep the N largest of each group."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.choices import CHANNEL, Layout

# Elements per block: small enough that a block's magnitudes and ranks stay in the cache.
_BLOCK = 1 << 16


def magnitude_mask(
    weight: npt.NDArray[np.floating], pattern: Pattern, layout: Layout = CHANNEL
) -> npt.NDArray[np.bool_]:
    """Keep the N largest magnitudes in each group of M.

    Args:
        weight: (K, C, R, S) or (K, C); finite.
        pattern: N:M.
        layout: See `patterns.group`; the flat layout is padded with virtual zeros where needed.

    Returns:
        Bool mask shaped like `weight`, exactly N True in each group. Ties keep the lower index.

    Raises:
        ValueError: The channels are not a multiple of M.
    """
    magnitude = np.abs(weight)
    if layout == CHANNEL:
        return keep_largest(magnitude, 1, pattern)
    flat = magnitude.reshape(len(weight), -1)
    padded = np.pad(flat, ((0, 0), (0, -flat.shape[1] % pattern.m)))
    return np.ascontiguousarray(keep_largest(padded, 1, pattern)[:, : flat.shape[1]]).reshape(weight.shape)


def keep_largest(scores: npt.NDArray[Any], axis: int, pattern: Pattern) -> npt.NDArray[np.bool_]:
    """Keep the N largest of each aligned group of M along an axis; ties keep the lower index.

    Args:
        scores: Array of any shape and any ordered dtype.
        axis: Axis that groups run along; its length must be a multiple of M.
        pattern: N:M.

    Returns:
        Bool, shaped like `scores`, True where kept.

    Raises:
        ValueError: The axis is not a multiple of M.
    """
    n, m = pattern.n, pattern.m
    if scores.shape[axis] % m:
        raise ValueError(f"{scores.shape[axis]} along axis {axis} is not a multiple of {m}")
    inner = math.prod(scores.shape[axis + 1 :])
    groups = np.ascontiguousarray(scores).reshape(-1, m, inner)
    kept = np.empty(groups.shape, np.bool_)
    step = max(_BLOCK // (m * inner), 1)
    for start in range(0, len(groups), step):
        block = groups[start : start + step]
        members = [np.ascontiguousarray(block[:, i]) for i in range(m)]
        # An element's rank is the number of elements of its group that beat it; for so few, counting pairs beats sorting.
        ranks = np.zeros((m, *members[0].shape), np.uint8)
        for i in range(m):
            for j in range(i + 1, m):
                later_wins = members[j] > members[i]
                ranks[i] += later_wins
                ranks[j] += ~later_wins
        for i in range(m):
            np.less(ranks[i], n, out=kept[start : start + step, i])
    return kept.reshape(scores.shape)


def kept_magnitude(weight: npt.NDArray[np.floating], mask: npt.NDArray[np.bool_]) -> float:
    """Fraction of a weight's absolute sum that a mask keeps, 0 to 1; 1 for a weight of zeros."""
    magnitude = np.abs(weight)
    total = float(magnitude.sum(dtype=np.float64))
    return float(magnitude.sum(dtype=np.float64, where=mask)) / total if total else 1.0
