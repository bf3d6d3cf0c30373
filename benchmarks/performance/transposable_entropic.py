"""Near-optimal transposable masks of many tiles at once: an entropic relaxation, rounded, then improved by exchanges.

The relaxed mask has entries from 0 to 1 whose rows and columns sum to N. Kept magnitude plus a small multiple of the
entropy has a unique maximum, found by Dykstra's alternating projections: scale the rows, scale the columns, clip at one,
and add back what was clipped in the next round (Benamou et al. 2015; used for N:M masks by Meng et al. 2025). Entries
above 0.5 are kept, rows and columns with too many or too few are repaired, and pairs of rows exchange entries until no
exchange gains. The result keeps exactly N in every row and column; its distance to the optimum is measured
(`transposable.json`), not proven.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.masking.compiled import compiled

# Sharpness of the relaxed problem in units of 1 / (a tile's mean), and rounds of projections: the best of those tried at
# 4:8 and 8:16, for normal and heavy-tailed weights. Exponents are clipped so that outliers do not crowd out the others.
_SHARPNESS, _MAX_EXPONENT = 6.0, 20.0
_ROUNDS = 30
# Entries per block: two such arrays fit the L1 cache, and inner loops run over tiles.
_BLOCK = 1 << 12
# A gain below this fraction of the tile's largest weight is rounding.
_NO_GAIN = 1e-12
_NONE = -1


def entropic_tiles(tiles: npt.NDArray[np.float64], pattern: Pattern) -> npt.NDArray[np.bool_]:
    """Masks that keep N in every row and column and that no exchange between two rows improves.

    Args:
        tiles: (T, M, M) magnitudes, finite, contiguous.
        pattern: N:M.

    Returns:
        Bool, shaped like `tiles`, True where kept.
    """
    n, m = pattern.n, pattern.m
    kept = np.zeros(tiles.shape, np.bool_)
    _solve(tiles, n, kept, max(_BLOCK // (m * m), 8))
    return kept


@compiled
def _solve(tiles: npt.NDArray[np.float64], n: int, kept: npt.NDArray[np.bool_], block: int) -> None:
    count, m = tiles.shape[0], tiles.shape[1]
    share = np.empty((m, m, block), np.float32)
    cut = np.empty((m, m, block), np.float32)
    room = np.empty(2 * m, np.int64)
    loss, gain = np.empty((m, m)), np.empty((m, m))
    for start in range(0, count, block):
        size = min(block, count - start)
        _relax(tiles[start : start + size], n, share, cut)
        for t in range(size):
            tile, mask = tiles[start + t], kept[start + t]
            _round(share[:, :, t], n, mask, room)
            _fill(tile, mask, room)
            _exchange(tile, mask, loss, gain)


@compiled
def _relax(
    tiles: npt.NDArray[np.float64], n: int, share: npt.NDArray[np.float32], cut: npt.NDArray[np.float32]
) -> None:
    """Dykstra's projections; `share` is the result, `cut` the factor by which each entry exceeded one."""
    size, m = tiles.shape[0], tiles.shape[1]
    one = np.float32(1)
    goal = np.float32(n)
    scale = np.empty(share.shape[2], np.float32)
    for t in range(size):
        mean = tiles[t].mean()
        sharpness = _SHARPNESS / mean if mean > 0 else 0.0
        for i in range(m):
            for j in range(m):
                share[i, j, t] = np.exp(min(sharpness * tiles[t, i, j], _MAX_EXPONENT))
    cut[:] = one
    for _ in range(_ROUNDS):
        for i in range(m):
            scale[:size] = np.float32(0)
            for j in range(m):
                for t in range(size):
                    scale[t] += share[i, j, t]
            for t in range(size):
                scale[t] = goal / scale[t]
            for j in range(m):
                for t in range(size):
                    share[i, j, t] *= scale[t]
        for j in range(m):
            scale[:size] = np.float32(0)
            for i in range(m):
                for t in range(size):
                    scale[t] += share[i, j, t]
            for t in range(size):
                scale[t] = goal / scale[t]
            for i in range(m):
                for t in range(size):
                    whole = share[i, j, t] * scale[t] * cut[i, j, t]
                    share[i, j, t] = min(whole, one)
                    cut[i, j, t] = max(whole, one)


@compiled
def _round(share: npt.NDArray[np.float32], n: int, kept: npt.NDArray[np.bool_], room: npt.NDArray[np.int64]) -> None:
    """Keep entries above 0.5; drop the smallest of rows and columns with too many, add the largest where there is room."""
    m = len(kept)
    half = np.float32(0.5)
    room[:] = n
    for i in range(m):
        for j in range(m):
            keeps = share[i, j] > half
            kept[i, j] = keeps
            room[i] -= keeps
            room[m + j] -= keeps
    for i in range(m):
        while room[i] < 0:
            smallest = _NONE
            for j in range(m):
                if kept[i, j] and (smallest == _NONE or share[i, j] < share[i, smallest]):
                    smallest = j
            kept[i, smallest] = False
            room[i] += 1
            room[m + smallest] += 1
    for j in range(m):
        while room[m + j] < 0:
            smallest = _NONE
            for i in range(m):
                if kept[i, j] and (smallest == _NONE or share[i, j] < share[smallest, j]):
                    smallest = i
            kept[smallest, j] = False
            room[smallest] += 1
            room[m + j] += 1
    for i in range(m):
        while room[i] > 0:
            largest = _NONE
            for j in range(m):
                if room[m + j] > 0 and not kept[i, j] and (largest == _NONE or share[i, j] > share[i, largest]):
                    largest = j
            if largest == _NONE:
                break
            kept[i, largest] = True
            room[i] -= 1
            room[m + largest] -= 1


@compiled
def _fill(tile: npt.NDArray[np.float64], kept: npt.NDArray[np.bool_], room: npt.NDArray[np.int64]) -> None:
    """Use the remaining room of rows and columns.

    For a row i and a column j with room: keep (a, j) if some row a has room and lacks j. Else keep (i, b) and (a, j) and
    drop (a, b), for the best such a and b. They exist: otherwise a row that lacks j would keep only columns of row i,
    which are fewer than N, and so have room.
    """
    m = len(kept)
    for i in range(m):
        for j in range(m):
            while room[i] > 0 and room[m + j] > 0:
                row = _NONE
                for a in range(m):
                    if room[a] > 0 and not kept[a, j] and (row == _NONE or tile[a, j] > tile[row, j]):
                        row = a
                room[m + j] -= 1
                if row != _NONE:
                    kept[row, j] = True
                    room[row] -= 1
                    continue
                column, best_gain = _NONE, 0.0
                for a in range(m):
                    if kept[a, j]:
                        continue
                    for b in range(m):
                        if kept[a, b] and not kept[i, b]:
                            gain = tile[i, b] + tile[a, j] - tile[a, b]
                            if row == _NONE or gain > best_gain:
                                row, column, best_gain = a, b, gain
                kept[i, column] = kept[row, j] = True
                kept[row, column] = False
                room[i] -= 1


@compiled
def _exchange(
    tile: npt.NDArray[np.float64],
    kept: npt.NDArray[np.bool_],
    loss: npt.NDArray[np.float64],
    gain: npt.NDArray[np.float64],
) -> None:
    """Let two rows exchange one column each while that gains; the gains of the two columns are independent.

    `loss` is what dropping an entry loses, infinite if it is not kept; `gain` what keeping it gains, -infinite if it is.
    """
    m = len(kept)
    min_gain = 0.0
    for i in range(m):
        for j in range(m):
            value = tile[i, j]
            min_gain = max(min_gain, value)
            loss[i, j] = value if kept[i, j] else np.inf
            gain[i, j] = -np.inf if kept[i, j] else value
    min_gain *= _NO_GAIN
    quiet = 0
    i, k = 0, 1
    while quiet < m * (m - 1) // 2:
        give, take = np.inf, -np.inf
        for j in range(m):
            less, more = loss[i, j] - gain[k, j], gain[i, j] - loss[k, j]
            give = less if less < give else give
            take = more if more > take else take
        if take - give > min_gain:
            for j in range(m):
                if loss[i, j] - gain[k, j] == give:
                    _swap(tile, kept, loss, gain, i, k, j)
                    break
            for j in range(m):
                if gain[i, j] - loss[k, j] == take:
                    _swap(tile, kept, loss, gain, k, i, j)
                    break
            quiet = 0
            continue
        quiet += 1
        k += 1
        if k == m:
            i += 1
            k = i + 1
        if k == m:
            i, k = 0, 1


@compiled
def _swap(
    tile: npt.NDArray[np.float64],
    kept: npt.NDArray[np.bool_],
    loss: npt.NDArray[np.float64],
    gain: npt.NDArray[np.float64],
    giver: int,
    taker: int,
    j: int,
) -> None:
    """Drop an entry of one row, keep the one in the same column of another."""
    kept[giver, j], kept[taker, j] = False, True
    loss[giver, j], gain[giver, j] = np.inf, tile[giver, j]
    loss[taker, j], gain[taker, j] = tile[taker, j], -np.inf
