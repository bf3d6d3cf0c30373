"""Hubara et al.'s 2-approximation of transposable masks, for comparison with the exact solvers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.masking.magnitude import keep_largest


def approximate_tiles(tiles: npt.NDArray[Any], pattern: Pattern) -> npt.NDArray[np.bool_]:
    """Drop the entries that are among the M-N smallest of their row or of their column.

    The paper visits a tile's entries in ascending order and drops each whose row or column has fewer than M-N dropped so
    far. The entries that a row drops this way are its M-N smallest, and the same holds for columns, so no order over the
    whole tile is needed. Any mask drops at least as much in each row as its smallest weigh, and the same in each column:
    together rows and columns drop at most twice what the best mask drops. Rows and columns keep at most N, often fewer.
    Time is linear in the number of weights.

    Args:
        tiles: (T, M, M) magnitudes.
        pattern: N:M.

    Returns:
        Bool, shaped like `tiles`, True where kept; ties keep the lower index, as in magnitude masks.
    """
    return keep_largest(tiles, 1, pattern) & keep_largest(tiles, 2, pattern)
