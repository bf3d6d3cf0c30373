"""The compiled flow against other solvers of the same problem: all masks, a network simplex, and HiGHS."""

from __future__ import annotations

import itertools
from functools import cache

import networkx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.masking.transposable_flow import solve_by_flow
from maskplan.pipeline.masking.transposable_table import choices, solve_by_table

LARGE = [(2, 5), (4, 5), (3, 6), (1, 8), (2, 8), (4, 8), (7, 8), (8, 8), (8, 16), (3, 12)]


def most_by_network_simplex(tile: npt.NDArray[np.int64], n: int) -> int:
    """What the best mask keeps, from networkx, which is exact for whole numbers."""
    m = len(tile)
    graph = networkx.DiGraph()
    graph.add_node("source", demand=-n * m)
    graph.add_node("sink", demand=n * m)
    for i in range(m):
        graph.add_edge("source", ("row", i), capacity=n, weight=0)
        graph.add_edge(("column", i), "sink", capacity=n, weight=0)
        for j in range(m):
            graph.add_edge(("row", i), ("column", j), capacity=1, weight=-int(tile[i, j]))
    return -int(networkx.min_cost_flow_cost(graph))


def sums(m: int) -> npt.NDArray[np.float64]:
    """The matrix that takes a flattened tile to its row sums and column sums."""
    return np.vstack([np.kron(np.eye(m), np.ones(m)), np.kron(np.ones(m), np.eye(m))])


def kept_by(tiles: npt.NDArray[np.floating], n: int) -> npt.NDArray[np.floating]:
    """What the flow's masks keep; they keep N in every row and column."""
    tiles = tiles.astype(np.float64)
    kept = solve_by_flow(tiles, Pattern(n, tiles.shape[1]))
    assert kept.shape == tiles.shape
    assert (kept.sum(axis=1) == n).all()
    assert (kept.sum(axis=2) == n).all()
    kept_magnitude: npt.NDArray[np.floating] = (tiles * kept).sum(axis=(1, 2))
    return kept_magnitude


def whole_numbers(rng: np.random.Generator, count: int, m: int, top: int) -> npt.NDArray[np.int64]:
    return rng.integers(0, top + 1, (count, m, m))


@pytest.mark.parametrize("top", [1, 3, 1000, 2**40])
@pytest.mark.parametrize(("n", "m"), LARGE)
def test_integer_tiles_have_the_optimum_of_networkx(n: int, m: int, top: int) -> None:
    tiles = whole_numbers(np.random.default_rng(n * m), 4, m, top)
    assert kept_by(tiles, n).tolist() == [most_by_network_simplex(tile, n) for tile in tiles]


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 7), top=st.sampled_from([1, 2, 9, 10**6]), data=st.data())
@settings(max_examples=40, deadline=None)
def test_tiles_of_any_kind_have_the_optimum_of_networkx(seed: int, n: int, top: int, data: st.DataObject) -> None:
    m = data.draw(st.integers(max(n, 2), 8))
    (tile,) = whole_numbers(np.random.default_rng(seed), 1, m, top)
    # Rows and columns of very different weight need the longest paths.
    if data.draw(st.booleans()):
        tile = tile * np.arange(1, m + 1) ** 3
    assert kept_by(tile[None], n).tolist() == [most_by_network_simplex(tile, n)]


@pytest.mark.parametrize(("n", "m"), LARGE)
def test_no_relaxed_mask_keeps_more(n: int, m: int) -> None:
    """HiGHS may cut weights in pieces; that the best needs none is what makes the flow exact."""
    tiles = np.abs(np.random.default_rng(n).standard_normal((5, m, m)))
    expected = [
        -linprog(-tile.ravel(), A_eq=sums(m), b_eq=np.full(2 * m, n), bounds=(0, 1), method="highs").fun
        for tile in tiles
    ]
    assert kept_by(tiles, n) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(2, 5), (4, 8), (2, 8)])
def test_no_integer_mask_keeps_more(n: int, m: int) -> None:
    tiles = np.random.default_rng(m).standard_t(2, (3, m, m)) ** 2
    expected = [
        -milp(
            -tile.ravel(),
            constraints=LinearConstraint(sums(m), n, n),
            integrality=np.ones(m * m),
            bounds=Bounds(0, 1),
        ).fun
        for tile in tiles
    ]
    assert kept_by(tiles, n) == pytest.approx(expected, rel=1e-6)


@given(
    seed=st.integers(0, 2**32 - 1), pattern=st.sampled_from([(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4), (4, 4)])
)
@settings(max_examples=60, deadline=None)
def test_flow_and_table_keep_the_most_of_all_masks(seed: int, pattern: tuple[int, int]) -> None:
    n, m = pattern
    tiles = whole_numbers(np.random.default_rng(seed), 5, m, 4).astype(np.float64)
    expected = (tiles[:, None] * all_masks(n, m)).sum(axis=(2, 3)).max(axis=1)
    assert np.array_equal(kept_by(tiles, n), expected)
    chosen = solve_by_table(tiles, Pattern(n, m))
    assert np.array_equal((tiles * chosen).sum(axis=(1, 2)), expected)


@cache
def all_masks(n: int, m: int) -> npt.NDArray[np.bool_]:
    every = np.array(list(itertools.product((False, True), repeat=m * m))).reshape(-1, m, m)
    return every[(every.sum(axis=1) == n).all(axis=1) & (every.sum(axis=2) == n).all(axis=1)]


@pytest.mark.parametrize(("n", "m", "count"), [(1, 4, 24), (2, 4, 90), (3, 4, 24), (4, 4, 1), (1, 2, 2), (2, 3, 6)])
def test_the_table_holds_every_mask_of_a_tile_once(n: int, m: int, count: int) -> None:
    table = choices(Pattern(n, m))
    assert len({tuple(row) for row in table.tolist()}) == len(table) == count == len(all_masks(n, m))


def test_ties_take_the_first_mask_of_the_table() -> None:
    kept = solve_by_table(np.ones((300, 4, 4)), Pattern(2, 4))
    assert (kept == kept[0]).all()
    assert kept[0].astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_rows_that_prefer_the_same_columns_share_them() -> None:
    """The most paths a tile can need: every row starts with the same N columns."""
    for n, m in ((4, 8), (2, 16), (31, 64)):
        tile = np.tile(np.arange(m), (m, 1))
        assert kept_by(tile[None], n).tolist() == [n * m * (m - 1) / 2]
