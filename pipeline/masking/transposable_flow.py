"""The best transposable mask of tiles of any size, by minimum-cost flow.

A tile is a bipartite graph of rows and columns in which keeping an entry sends one unit from its row to its column at a
cost of -|W|; every row sends N units, every column takes N (Hubara et al. 2021, there for the dropped entries). The flow
starts with every row's N largest entries, which is optimal for the column counts that result, and moves one unit at a time
from a column with too many to one with too few, along the shortest path of the residual graph. Costs reduced by the nodes'
potentials are never negative (Edmonds and Karp 1972), so Dijkstra's algorithm applies: on M + M nodes, without a heap.
A path takes O(M^2), and a tile needs at most N(M-N) paths; random tiles at 4:8 need four or five.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.masking.compiled import compiled

_NONE = -1


def solve_by_flow(tiles: npt.NDArray[np.float64], pattern: Pattern) -> npt.NDArray[np.bool_]:
    """The mask of each tile that keeps most magnitude, among all that keep N in every row and column.

    Args:
        tiles: (T, M, M) magnitudes, finite, contiguous.
        pattern: N:M.

    Returns:
        Bool, shaped like `tiles`, True where kept. Integers are solved exactly, other values up to the rounding of float64.
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
    """Keep the N largest of each row. Nodes are rows, then columns; a row's potential is the smallest entry it keeps."""
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
    """Find the column with too few that is nearest to all columns with too many, and update the potentials.

    An edge runs from a column to each row that keeps it, at the cost of dropping the entry, and from a row to each column
    that it does not keep, at minus the gain of keeping it.
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
        reached = distance[node]
        if node >= m and excess[node - m] < 0:
            break
        done[node] = True
        if node < m:
            for j in range(m):
                if not kept[node, j] and not done[m + j]:
                    # Reduced costs are negative only by rounding.
                    to = reached + max(potential[node] - tile[node, j] - potential[m + j], 0.0)
                    if to < distance[m + j]:
                        distance[m + j], before[m + j] = to, node
        else:
            for i in range(m):
                if kept[i, node - m] and not done[i]:
                    to = reached + max(potential[node] + tile[i, node - m] - potential[i], 0.0)
                    if to < distance[i]:
                        distance[i], before[i] = to, node
    for x in range(2 * m):
        if done[x]:
            potential[x] += distance[x] - reached
    return node


@compiled
def _move(kept: npt.NDArray[np.bool_], excess: npt.NDArray[np.int64], before: npt.NDArray[np.int64], end: int) -> None:
    """Move one unit along the path that ends at column node `end`."""
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
