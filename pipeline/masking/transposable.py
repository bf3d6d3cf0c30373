"""Transposable masks: N:M along C and along K at once, so that a weight and its transpose are both N:M.

A *tile* is M output by M input channels at one kernel position (r, s), true to what a product with the weight and one with
its transpose read. Tiles have nothing to do with each other, and a mask is transposable when every row and every column
of every tile keeps at most N. (The code of Hubara et al. 2021 cuts its tiles from within one filter instead; the transpose
of such a weight is not N:M.)

What each method guarantees, of the kept magnitude:

- `exact`: exactly N in every row and column, and no such mask keeps more, to the rounding of float64. Tiles up to 4x4 by
  comparing all patterns (90 for 2:4), larger ones by minimum-cost flow.
- `entropic`: exactly N in every row and column, and no exchange between two rows of a tile would keep more; how close that
  is to the most possible is measured (`benchmarks/performance/transposable.json`), not proven.
- `approximate`: Hubara et al.'s 2-approximation. At most N in every row and column, often fewer; what it drops weighs at
  most twice what the exact mask drops.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.errors import HostError, InputError, listed
from maskplan.pipeline.masking.magnitude import keep_largest
from maskplan.pipeline.masking.patterns import count_violations

EXACT, ENTROPIC, APPROXIMATE = "exact", "entropic", "approximate"
METHODS = (EXACT, ENTROPIC, APPROXIMATE)

Floats = npt.NDArray[np.floating]
# (T, M, M) of |W| in float64 to the same of kept.
TileSolver = Callable[[npt.NDArray[np.float64], Pattern], npt.NDArray[np.bool_]]

# Weights a chunk: memory beyond weight and mask stays at a few such chunks for each thread.
_CHUNK = 1 << 18
_LARGEST_TABLE = 4


def transposable_mask(
    weight: Floats, pattern: Pattern, method: str = EXACT, *, name: str | None = None, threads: int | None = None
) -> npt.NDArray[np.bool_]:
    """Keep much magnitude with at most N of M along C and along K.

    Args:
        weight: (K, C, R, S) or (K, C); finite, K and C multiples of M.
        pattern: N:M.
        method: One of `METHODS`; the module says what each guarantees.
        name: Of the weight, for messages.
        threads: How many share the work; all cores by default. The mask does not depend on it.

    Returns:
        Bool mask shaped like `weight`.

    Raises:
        InputError: K or C is not a multiple of M, N > M, an unknown method, or a weight that is not finite.
        HostError: numba is not installed (`approximate` needs none).
    """
    name = name or "the weight"
    return transposable_masks({name: weight}, pattern, method, threads=threads)[name]


def transposable_masks(
    weights: Mapping[str, Floats], pattern: Pattern, method: str = EXACT, *, threads: int | None = None
) -> dict[str, npt.NDArray[np.bool_]]:
    """As `transposable_mask`, for the weights of a model by name.

    Raises:
        InputError: As there; all weights at fault are named before any mask is made.
        HostError: As there.
    """
    _require_tiles(weights, pattern)
    solve = _solver(pattern, method)
    masks = {name: np.empty(weight.shape, np.bool_) for name, weight in weights.items()}

    def fill(chunk: tuple[str, tuple[slice, slice]]) -> None:
        name, at = chunk
        part = weights[name][at]
        masks[name][at] = _untiled(solve(_tiled(part, pattern.m), pattern), part.shape)

    chunks = [(name, at) for name, weight in weights.items() for at in _chunks(weight.shape, pattern.m)]
    with ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="tiles") as pool:
        for _ in pool.map(fill, chunks):
            pass
    return masks


def transposed_violations(mask: npt.NDArray[np.bool_], pattern: Pattern) -> tuple[int, int]:
    """How many groups of a mask keep more than N along C, and how many along K."""
    return count_violations(mask, pattern), count_violations(np.swapaxes(mask, 0, 1), pattern)


def lighter_half(tiles: npt.NDArray[Any], pattern: Pattern) -> npt.NDArray[np.bool_]:
    """Hubara et al.'s 2-approximation: drop what is among the M-N lightest of its row or of its column.

    The paper goes through a tile's entries from light to heavy and drops each whose row or column has fewer than M-N dropped
    so far. Those a row asks for are then its M-N lightest, and the same of columns, which needs no order over the tile.
    Any mask drops at least as much in each row as the row's lightest weigh, and the same in each column: together the rows
    and columns ask for at most twice what the best mask drops. Time is linear in the number of weights.

    Args:
        tiles: (T, M, M) magnitudes.
        pattern: N:M.

    Returns:
        Kept, shaped like `tiles`; ties keep the lower index, as in magnitude masks.
    """
    return keep_largest(tiles, 1, pattern) & keep_largest(tiles, 2, pattern)


def _solver(pattern: Pattern, method: str) -> TileSolver:
    if method not in METHODS:
        raise InputError(f"unknown method {method!r} of transposable masks", fix=f"choose one of {', '.join(METHODS)}")
    if method == APPROXIMATE:
        return lighter_half
    try:
        if method == ENTROPIC:
            from maskplan.pipeline.masking.transposable_entropic import entropic_tiles

            return entropic_tiles
        if pattern.m <= _LARGEST_TABLE:
            from maskplan.pipeline.masking.transposable_table import solve_by_table

            return solve_by_table
        from maskplan.pipeline.masking.transposable_flow import solve_by_flow

        return solve_by_flow
    except ModuleNotFoundError as error:
        raise HostError(
            f"numba is not installed, and {method} transposable masks need it",
            found=error,
            fix="pip install 'maskplan[learn]', or choose the method 'approximate'",
        ) from error


def _require_tiles(weights: Mapping[str, Floats], pattern: Pattern) -> None:
    n, m = pattern.n, pattern.m
    if not 1 <= n <= m:
        raise InputError(
            "no transposable mask keeps that", found=f"the pattern {pattern}", fix="N is at least 1 and at most M"
        )
    wrong, broken = [], []
    for name, weight in weights.items():
        if weight.ndim < 2:
            wrong.append(f"{name} {weight.shape}: no two axes")
        elif weight.shape[0] % m or weight.shape[1] % m:
            axes = [f"{axis} = {size}" for axis, size in zip("KC", weight.shape, strict=False) if size % m]
            wrong.append(f"{name} {weight.shape}: {' and '.join(axes)}")
        # NaN is the largest of anything; no array of the weight's size is made.
        elif not (math.isfinite(float(weight.max(initial=0))) and math.isfinite(float(weight.min(initial=0)))):
            broken.append(name)
    if wrong:
        raise InputError(
            f"{len(wrong)} of {len(weights)} weights cannot be cut into tiles of {m}x{m}",
            found=listed(wrong),
            fix=f"transposable {pattern} masks need input and output channels in multiples of {m}: leave these out",
        )
    if broken:
        raise InputError(
            f"{len(broken)} of {len(weights)} weights hold NaN or infinity",
            found=listed(broken),
            fix="use a checkpoint from before training diverged",
        )


def _chunks(shape: tuple[int, ...], m: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of whole tiles along K and C, of about `_CHUNK` weights."""
    tile = m * m * max(math.prod(shape[2:]), 1)
    across = max(min(_CHUNK // tile, shape[1] // m), 1)
    down = max(_CHUNK // (across * tile), 1)
    for k in range(0, shape[0], down * m):
        for c in range(0, shape[1], across * m):
            yield slice(k, k + down * m), slice(c, c + across * m)


def _tiled(weight: Floats, m: int) -> npt.NDArray[np.float64]:
    """(K, C, ...) to the magnitudes of (T, M, M)."""
    k, c = weight.shape[0] // m, weight.shape[1] // m
    cut = weight.reshape(k, m, c, m, math.prod(weight.shape[2:])).transpose(0, 2, 4, 1, 3)
    # A new array in any case: the weight is not written to.
    tiles = np.abs(cut).astype(np.float64, order="C")
    # A power of two brings the largest below one, so that no sum overflows and no small scale is lost.
    _, exponent = math.frexp(tiles.max(initial=0))
    tiles *= 2.0 ** -max(exponent, -1000)
    return tiles.reshape(-1, m, m)


def _untiled(tiles: npt.NDArray[np.bool_], shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """(T, M, M) back to (K, C, ...)."""
    m = tiles.shape[1]
    cut = tiles.reshape(shape[0] // m, shape[1] // m, math.prod(shape[2:]), m, m)
    return cut.transpose(0, 3, 1, 4, 2).reshape(shape)
