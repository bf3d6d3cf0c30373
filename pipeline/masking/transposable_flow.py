"""The best transposable mask of tiles of any size, by minimum-cost flow.

A tile is a bipartite graph of rows and columns in which keeping an entry sends one unit from its row to its column at the
cost of -|W|; every row sends N, every column takes N (Hubara et al. 2021, there for the dropped entries). The flow starts
with every row's N largest, the cheapest there is for the columns' counts as they then are, and moves one unit at a time from
a column that has too many to one that has too few, along the shortest path of the residual graph. Costs reduced by the
nodes' potentials are never negative (Edmonds and Karp 1972), so Dijkstra's search serves: on M + M nodes, without a heap.
A path takes O(M^2), and a tile at most N(M-N) paths; random tiles at 4:8 take four or five.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.masking.compiled import compiled

_NONE = -1


def solve_by_flow(tiles: npt.NDArray[np.float64], pattern: Pattern) -> npt.NDArray[np.bool_]:
    """The mask of each tile that keeps most, of all that keep N in every row and column.

    Args:
        tiles: (T, M, M) magnitudes, finite, contiguous.
        pattern: N:M.

    Returns:
        Kept, shaped like `tiles`. Whole numbers are solved exactly, others to the rounding of float64.
    """
    kept = np.zeros(tiles.shape, np.bool_)
    _solve(tiles, pattern.n, kept)
    return kept


@compiled
def _solve(tiles: npt.NDArray[np.float64], n: int, kept: npt.NDArray[np.bool_]) -> None:
    m = tiles.shape[1]
    excess = np.empty(m, np.int64)
    potential, distance = np.empty(2 * m), np.empty(2 * m)
    before = np.empty(2 * m, np.int64)
    done = np.empty(2 * m, np.bool_)
    for t in range(len(tiles)):
        _start(tiles[t], n, kept[t], excess, potential)
        left = 0
        for j in range(m):
            left += max(excess[j], 0)
        for _ in range(left):
            end = _search(tiles[t], kept[t], excess, potential, distance, before, done)
            _move(kept[t], excess, before, end)


@compiled
def _start(
    tile: npt.NDArray[np.float64],
    n: int,
    kept: npt.NDArray[np.bool_],
    excess: npt.NDArray[np.int64],
    potential: npt.NDArray[np.float64],
) -> None:
    """Keep the N largest of each row. Nodes are the rows, then the columns; a row's potential is the least that it keeps."""
    m = len(tile)
    excess[:] = -n
    potential[m:] = 0
    for i in range(m):
        for _ in range(n):
            best = _NONE
            for j in range(m):
                if not kept[i, j] and (best == _NONE or tile[i, j] > tile[i, best]):
                    best = j
            kept[i, best] = True
            excess[best] += 1
            potential[i] = tile[i, best]


@compiled
def _search(
    tile: npt.NDArray[np.float64],
    kept: npt.NDArray[np.bool_],
    excess: npt.NDArray[np.int64],
    potential: npt.NDArray[np.float64],
    distance: npt.NDArray[np.float64],
    before: npt.NDArray[np.int64],
    done: npt.NDArray[np.bool_],
) -> int:
    """Find the nearest column with too few from all with too many, and update the potentials.

    An edge runs from a column to each row that keeps it, at the cost of dropping the entry, and from a row to each column
    that it does not keep, at the gain of keeping it.
    """
    m = len(tile)
    distance[:] = np.inf
    before[:] = _NONE
    done[:] = False
    for j in range(m):
        if excess[j] > 0:
            distance[m + j] = 0
    while True:
        node = _NONE
        for x in range(2 * m):
            if not done[x] and (node == _NONE or distance[x] < distance[node]):
                node = x
        here = distance[node]
        if node >= m and excess[node - m] < 0:
            break
        done[node] = True
        if node < m:
            for j in range(m):
                if not kept[node, j] and not done[m + j]:
                    # Reduced costs are not negative but for rounding.
                    to = here + max(potential[node] - tile[node, j] - potential[m + j], 0.0)
                    if to < distance[m + j]:
                        distance[m + j], before[m + j] = to, node
        else:
            for i in range(m):
                if kept[i, node - m] and not done[i]:
                    to = here + max(potential[node] + tile[i, node - m] - potential[i], 0.0)
                    if to < distance[i]:
                        distance[i], before[i] = to, node
    for x in range(2 * m):
        if done[x]:
            potential[x] += distance[x] - here
    return node


@compiled
def _move(kept: npt.NDArray[np.bool_], excess: npt.NDArray[np.int64], before: npt.NDArray[np.int64], end: int) -> None:
    """Move one unit along the path that ends there."""
    m = len(kept)
    excess[end - m] += 1
    node = end
    while before[node] != _NONE:
        last = before[node]
        if last < m:
            kept[last, node - m] = True
        else:
            kept[node, last - m] = False
        node = last
    excess[node - m] -= 1
