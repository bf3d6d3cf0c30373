"""The solvers of transposable masks that the benchmark compares with the exact ones, on tiles and on whole weights."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transposable_approximate import approximate_tiles
from transposable_entropic import entropic_tiles

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.masking.transposable import TileSolver, solve_tiles, transposed_violations

SMALL = [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4), (4, 4)]
VALUES = st.sampled_from([0.0, 1.0, 1.0, 2.0, 3.0, 5.0, 8.0, 0.5, 1e-3, 100.0])
SOLVERS = {"entropic": entropic_tiles, "approximate": approximate_tiles}


def masked(weight: npt.NDArray[np.floating], pattern: Pattern, solve: TileSolver) -> npt.NDArray[np.bool_]:
    return solve_tiles({"weight": weight}, pattern, solve)["weight"]


@cache
def all_masks(n: int, m: int) -> npt.NDArray[np.bool_]:
    """Every tile of zeros and ones whose rows and columns sum to N."""
    rows = [row for row in itertools.product((0, 1), repeat=m) if sum(row) == n]
    tiles = np.array(list(itertools.product(rows, repeat=m)), np.bool_)
    return tiles[(tiles.sum(axis=1) == n).all(axis=1)]


def best_kept(tile: npt.NDArray[np.floating], n: int) -> float:
    """What the best of all masks keeps."""
    return float((all_masks(n, len(tile)) * tile).sum(axis=(1, 2)).max())


def one_by_one(tile: npt.NDArray[np.floating], n: int) -> npt.NDArray[np.bool_]:
    """The 2-approximation as in the paper: in ascending order, drop while the row or the column has too few dropped."""
    m = len(tile)
    kept = np.ones((m, m), np.bool_)
    # Of equals, the later one is dropped first.
    for i, j in sorted(np.ndindex(m, m), key=lambda at: (tile[at], -at[0], -at[1])):
        if (~kept[i]).sum() < m - n or (~kept[:, j]).sum() < m - n:
            kept[i, j] = False
    return kept


@given(data=st.data(), pattern=st.sampled_from(SMALL))
@settings(max_examples=60, deadline=None)
def test_the_approximate_mask_drops_what_the_paper_drops_and_at_most_twice_the_least(
    data: st.DataObject, pattern: tuple[int, int]
) -> None:
    n, m = pattern
    tile = np.array(data.draw(st.lists(VALUES, min_size=m * m, max_size=m * m))).reshape(m, m)
    mask = approximate_tiles(tile[None], Pattern(n, m))[0]
    assert np.array_equal(mask, one_by_one(tile, n))
    assert tile[~mask].sum() <= 2 * (tile.sum() - best_kept(tile, n)) * (1 + 1e-12)


@pytest.mark.parametrize("m", [6, 8])
def test_the_approximate_mask_of_larger_tiles_drops_what_the_paper_drops(m: int) -> None:
    tiles = np.abs(np.random.default_rng(0).integers(-2, 3, (30, m, m)))
    for n in range(1, m + 1):
        for tile, mask in zip(tiles, approximate_tiles(tiles, Pattern(n, m)), strict=True):
            assert np.array_equal(mask, one_by_one(tile, n))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (2, 6), (4, 8), (8, 16)])
def test_masks_of_weights_conform_along_both_axes(solver: str, pattern: tuple[int, int]) -> None:
    n, m = pattern
    weight = np.random.default_rng(0).standard_normal((3 * m, 2 * m, 3, 3)).astype(np.float32)
    mask = masked(weight, Pattern(n, m), SOLVERS[solver])
    assert transposed_violations(mask, Pattern(n, m)) == (0, 0)
    if solver == "entropic":
        assert mask.sum() * m == weight.size * n


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**1020])
def test_the_scale_of_weights_does_not_matter(solver: str, scale: float) -> None:
    weight = np.random.default_rng(0).integers(-8, 8, (16, 16)).astype(np.float64)
    for pattern in (Pattern(2, 4), Pattern(4, 8)):
        expected = masked(weight, pattern, SOLVERS[solver])
        assert np.array_equal(masked(weight * scale, pattern, SOLVERS[solver]), expected)


def test_the_entropic_solver_keeps_n_of_m_zeros() -> None:
    for n, m in ((2, 4), (3, 8)):
        mask = masked(np.zeros((2 * m, m, 3, 3), np.float32), Pattern(n, m), entropic_tiles)
        assert transposed_violations(mask, Pattern(n, m)) == (0, 0)
        assert mask.sum() * m == mask.size * n
