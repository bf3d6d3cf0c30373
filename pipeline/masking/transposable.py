"""Transposable masks: N:M along C and along K at once, so that a weight and its transpose are both N:M.

A *tile* is M output by M input channels at one kernel position (r, s), as a product with the weight and one with its
transpose both read it. Tiles are independent, and a mask is transposable when every row and every column of every tile
keeps at most N. (The code of Hubara et al. 2021 cuts its tiles from within one filter instead; the transpose of such a
weight is not N:M.)

The mask is exact: it keeps exactly N in every row and column, and no such mask keeps more magnitude, up to the rounding
of float64. Tiles up to 4x4 are solved by comparing all patterns (90 for 2:4), larger ones by minimum-cost flow. Faster
solvers that give up exactness are compared in `benchmarks/performance/transposable.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.errors import HostError, InputError, listed
from maskplan.pipeline.masking.patterns import count_violations

Floats = npt.NDArray[np.floating]
TileSolver = Callable[[npt.NDArray[np.float64], Pattern], npt.NDArray[np.bool_]]
"""Takes the magnitudes of tiles, float64 (T, M, M), and returns which entries are kept, bool (T, M, M)."""

# Weights per chunk: memory beyond weight and mask stays at a few such chunks per thread.
_CHUNK = 1 << 18
_MAX_TABLE_M = 4


def transposable_mask(
    weight: Floats, pattern: Pattern, *, name: str = "the weight", threads: int | None = None
) -> npt.NDArray[np.bool_]:
    """Keep the most magnitude with exactly N of M along C and along K.

    Args:
        weight: (K, C, R, S) or (K, C); finite, K and C multiples of M.
        pattern: N:M.
        name: Of the weight, for error messages.
        threads: Number of threads, all cores by default. The mask does not depend on it.

    Returns:
        Bool mask shaped like `weight`.

    Raises:
        InputError: K or C is not a multiple of M, N > M, or the weight is not finite.
        HostError: numba is not installed.
    """
    return transposable_masks({name: weight}, pattern, threads=threads)[name]


def transposable_masks(
    weights: Mapping[str, Floats], pattern: Pattern, *, threads: int | None = None
) -> dict[str, npt.NDArray[np.bool_]]:
    """As `transposable_mask`, for the weights of a model by name.

    Raises:
        InputError: As for `transposable_mask`; all invalid weights are named before any mask is computed.
        HostError: As for `transposable_mask`.
    """
    require_tiles(weights, pattern)
    return solve_tiles(weights, pattern, _exact_solver(pattern), threads=threads)


def solve_tiles(
    weights: Mapping[str, Floats], pattern: Pattern, solve: TileSolver, *, threads: int | None = None
) -> dict[str, npt.NDArray[np.bool_]]:
    """Cut weights into tiles, solve these in chunks on several threads, and put the masks together.

    Args:
        weights: Weights that `require_tiles` accepts, by name.
        pattern: N:M.
        solve: Solver of tiles; it must release the GIL for threads to help.
        threads: Number of threads, all cores by default.

    Returns:
        Bool masks by name, each shaped like its weight.
    """
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
    """Number of groups of a mask that keep more than N along C, and number that do along K."""
    return count_violations(mask, pattern), count_violations(np.swapaxes(mask, 0, 1), pattern)


def require_tiles(weights: Mapping[str, Floats], pattern: Pattern) -> None:
    """Raise unless all weights are finite and consist of whole M x M tiles.

    Raises:
        InputError: Otherwise; all invalid weights are named.
    """
    n, m = pattern.n, pattern.m
    if not 1 <= n <= m:
        raise InputError(
            "invalid pattern of transposable masks", found=str(pattern), fix="N must be at least 1 and at most M"
        )
    misshapen, not_finite = [], []
    for name, weight in weights.items():
        if weight.ndim < 2:
            misshapen.append(f"{name} {weight.shape}: fewer than two axes")
        elif weight.shape[0] % m or weight.shape[1] % m:
            axes = [f"{axis} = {size}" for axis, size in zip("KC", weight.shape, strict=False) if size % m]
            misshapen.append(f"{name} {weight.shape}: {' and '.join(axes)}")
        # `max` propagates NaN, and needs no temporary array of the weight's size.
        elif not (math.isfinite(float(weight.max(initial=0))) and math.isfinite(float(weight.min(initial=0)))):
            not_finite.append(name)
    if misshapen:
        raise InputError(
            f"{len(misshapen)} of {len(weights)} weights cannot be cut into tiles of {m}x{m}",
            found=listed(misshapen),
            fix=f"transposable {pattern} masks need input and output channels in multiples of {m}: leave these out",
        )
    if not_finite:
        raise InputError(
            f"{len(not_finite)} of {len(weights)} weights contain NaN or infinity",
            found=listed(not_finite),
            fix="use a checkpoint from before training diverged",
        )


def _exact_solver(pattern: Pattern) -> TileSolver:
    try:
        if pattern.m <= _MAX_TABLE_M:
            from maskplan.pipeline.masking.transposable_table import solve_by_table

            return solve_by_table
        from maskplan.pipeline.masking.transposable_flow import solve_by_flow

        return solve_by_flow
    except ModuleNotFoundError as error:
        raise HostError(
            "numba is not installed; transposable masks need it",
            found=error,
            fix="pip install 'maskplan[learn]', or choose magnitude masks",
        ) from error


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
    # `abs` always allocates: the weight is never written to.
    tiles = np.abs(cut).astype(np.float64, order="C")
    # Scale by a power of two so that the largest is below one: no sum overflows, no small value underflows.
    _, exponent = math.frexp(tiles.max(initial=0))
    tiles *= 2.0 ** -max(exponent, -1000)
    return tiles.reshape(-1, m, m)


def _untiled(tiles: npt.NDArray[np.bool_], shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """(T, M, M) back to (K, C, ...)."""
    m = tiles.shape[1]
    cut = tiles.reshape(shape[0] // m, shape[1] // m, math.prod(shape[2:]), m, m)
    return cut.transpose(0, 3, 1, 4, 2).reshape(shape)
