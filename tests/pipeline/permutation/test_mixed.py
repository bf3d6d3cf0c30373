"""Tests of pipeline/permutation/mixed.py, against all orders of small groups."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from maskplan.pipeline.permutation.axes import Integers
from maskplan.pipeline.permutation.mixed import Reader, descend
from maskplan.pipeline.permutation.search import kept


def reader(seed: int, rows: int, columns: int, positions: list[int]) -> Reader:
    scores = np.abs(np.random.default_rng(seed).standard_normal((rows, columns))).astype(np.float32)
    return Reader(f"layer{seed}", scores, np.array(positions))


def total(readers: list[Reader], order: Integers, n: int = 2, m: int = 4) -> float:
    found = 0.0
    for each in readers:
        scores = each.scores.copy()
        scores[:, each.positions] = each.scores[:, each.positions[order]]
        found += kept(scores, n, m)
    return found


READERS = {
    "every second column": [reader(1, 5, 12, [0, 2, 4, 6, 8, 10])],
    "two layers that part them otherwise": [reader(2, 4, 8, [0, 1, 2, 4, 5, 6]), reader(3, 6, 12, [11, 0, 3, 8, 5, 6])],
    "more than a whole group": [reader(4, 7, 16, [3, 4, 5, 6, 7, 12])],
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 4), (1, 2)])
def test_no_further_swap_gains(name: str, pattern: tuple[int, int]) -> None:
    readers, (n, m) = READERS[name], pattern
    before = [r.scores.copy() for r in readers]
    order = descend(readers, n, m)
    found = total(readers, order, n, m)
    given = total(readers, np.arange(6), n, m)
    most = max(total(readers, np.array(other), n, m) for other in permutations(range(6)))
    assert given <= found <= most + 1e-5
    for i in range(6):
        for j in range(i):
            swapped = order.copy()
            swapped[[i, j]] = order[[j, i]]
            assert total(readers, swapped, n, m) <= found + 1e-4
    # What was found is worth the name, and the given scores are as they were.
    assert most - found <= 0.5 * (most - given) + 1e-5
    assert all(np.array_equal(r.scores, b) for r, b in zip(readers, before, strict=True))


def test_equal_scores_end_the_descent_at_once() -> None:
    flat = Reader("flat", np.ones((3, 8), np.float32), np.arange(0, 8, 2))
    np.testing.assert_array_equal(descend([flat], 2, 4), np.arange(4))
