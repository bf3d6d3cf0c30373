"""The best transposable mask of small tiles, by comparing every pattern that a tile can have: 90 for 2:4."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.masking.compiled import compiled
from maskplan.pipeline.masking.patterns import pattern_table

# Tiles per block: the scores of a block's rows fit the L2 cache, and inner loops run over tiles.
_BLOCK = 256


def solve_by_table(tiles: npt.NDArray[np.float64], pattern: Pattern) -> npt.NDArray[np.bool_]:
    """The mask of each tile that keeps most magnitude, among all that keep N in every row and column.

    Args:
        tiles: (T, M, M) magnitudes, finite, contiguous.
        pattern: N:M; the table grows fast, so M should be at most 4.

    Returns:
        Bool, shaped like `tiles`, True where kept; ties go to the mask whose rows come first in `pattern_table`.
    """
    rows = pattern_table(pattern)
    kept = np.empty(tiles.shape, np.bool_)
    _choose(tiles, rows, choices(pattern), kept)
    return kept


@cache
def choices(pattern: Pattern) -> npt.NDArray[np.int64]:
    """All masks of a tile with exactly N in every row and column, (P, M): for each row its index into `pattern_table`."""
    rows = pattern_table(pattern)
    chosen = [
        at
        for at in itertools.product(range(len(rows)), repeat=pattern.m)
        if (rows[list(at)].sum(axis=0) == pattern.n).all()
    ]
    table = np.array(chosen, np.int64)
    table.setflags(write=False)
    return table


@compiled
def _choose(
    tiles: npt.NDArray[np.float64],
    rows: npt.NDArray[np.bool_],
    table: npt.NDArray[np.int64],
    kept: npt.NDArray[np.bool_],
) -> None:
    count, m = tiles.shape[0], tiles.shape[1]
    scores = np.empty((m, len(rows), _BLOCK))
    total, best = np.empty(_BLOCK), np.empty(_BLOCK)
    winner = np.empty(_BLOCK, np.int64)
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        for i in range(m):
            for p in range(len(rows)):
                scores[i, p, :size] = 0
                for j in range(m):
                    if rows[p, j]:
                        for t in range(size):
                            scores[i, p, t] += tiles[start + t, i, j]
        best[:size] = -1
        for p in range(len(table)):
            total[:size] = scores[0, table[p, 0], :size]
            for i in range(1, m):
                row = scores[i, table[p, i]]
                for t in range(size):
                    total[t] += row[t]
            for t in range(size):
                better = total[t] > best[t]
                best[t] = total[t] if better else best[t]
                winner[t] = p if better else winner[t]
        for t in range(size):
            for i in range(m):
                kept[start + t, i] = rows[table[winner[t], i]]
