"""Mask diversity: how many masks a kind of sparsity allows, by the formula of Hubara et al. (2021) and by exact count.

The paper claims that a kind of sparsity with more masks costs less accuracy. For T weights of which N/M are kept there
are

- unstructured: T choose T N/M;
- N:M: (M choose N)^(T/M);
- transposable N:M: c^(T/M^2), where c is the number of M x M tiles with N in every row and column.

For c the paper gives M! (M-1)! ... (M-N+1)! with N the zeros of a group, which counts tiles more than once: 144 instead
of 90 for 2:4, and 1.76e13 instead of 116,963,796,250 for 4:8. Both counts are computed here and kept separate: by the
paper's formula transposable 4:8 has more masks than 2:4 along one axis, by the exact count it has fewer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.errors import InputError, listed


@dataclass(frozen=True)
class Diversity:
    """Numbers of masks as base-10 logarithms: products over layers become sums.

    Attributes:
        weights: Number of masked weights.
        pattern: N:M.
        unstructured: Any weights, as many as N:M keeps.
        one_axis: N:M along C.
        transposable: N:M along C and along K, counted exactly.
        transposable_by_paper: The same by the paper's formula, which counts some masks more than once.
    """

    weights: int
    pattern: Pattern
    unstructured: float
    one_axis: float
    transposable: float
    transposable_by_paper: float


def diversity(weights: Iterable[int], pattern: Pattern) -> Diversity:
    """The diversity of masks that keep exactly N of M, over weights of these sizes together.

    Unstructured masks choose among the weights of all layers at once, as global magnitude pruning does.

    Args:
        weights: Numbers of weights, each a multiple of M * M.
        pattern: N:M. The exact count takes a second at 6:12 and about a minute at 8:16; much larger patterns are infeasible.

    Raises:
        InputError: Not 1 <= N <= M, or sizes that are not a whole number of tiles.
    """
    n, m = pattern.n, pattern.m
    _require(pattern)
    sizes = list(weights)
    wrong = [size for size in sizes if size < 0 or size % (m * m)]
    if wrong:
        raise InputError(
            f"{len(wrong)} of {len(sizes)} weights do not consist of whole {m}x{m} tiles",
            found=listed(wrong),
            fix="count the weights of layers whose input and output channels are multiples of M",
        )
    total = sum(sizes)
    tiles = total // (m * m)
    return Diversity(
        weights=total,
        pattern=pattern,
        unstructured=_log10_choose(total, total * n // m),
        one_axis=total // m * math.log10(math.comb(m, n)),
        transposable=tiles * math.log10(tile_masks(pattern)),
        transposable_by_paper=tiles * math.log10(tile_masks_by_paper(pattern)),
    )


@cache
def tile_masks(pattern: Pattern) -> int:
    """Number of M x M tiles with exactly N in every row and column: 90 for 2:4, 116,963,796,250 for 4:8.

    Rows are placed one after the other. What matters of the previous rows is how many columns lack 0, 1, ... N more
    entries, so a state is those N+1 counts.

    Raises:
        InputError: Not 1 <= N <= M.
    """
    _require(pattern)
    n, m = pattern.n, pattern.m
    if 2 * n > m:
        # The dropped entries form such a tile too, with fewer states.
        n = m - n
    states = Counter({(0,) * n + (m,): 1})
    for _ in range(m):
        after: Counter[tuple[int, ...]] = Counter()
        for lacking, count in states.items():
            for state, placements in _place_row(lacking, n):
                after[state] += count * placements
        states = after
    return states[(m,) + (0,) * n]


def tile_masks_by_paper(pattern: Pattern) -> int:
    """The paper's formula for the same number, M! (M-1)! ... (M-Z+1)! with Z = M-N zeros in a group; it is too high.

    Raises:
        InputError: Not 1 <= N <= M.
    """
    _require(pattern)
    return math.prod(math.factorial(pattern.m - i) for i in range(pattern.m - pattern.n))


def _require(pattern: Pattern) -> None:
    if not 1 <= pattern.n <= pattern.m:
        raise InputError("invalid pattern", found=str(pattern), fix="N must be at least 1 and at most M")


def _place_row(lacking: tuple[int, ...], remaining: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Place the remaining entries of a row in columns that lack some: yields new states and their numbers of ways."""
    level = len(lacking) - 1
    if level == 0:
        if remaining == 0:
            yield lacking, 1
        return
    for used in range(min(lacking[level], remaining) + 1):
        for lower, ways in _place_row(lacking[:level], remaining - used):
            # `used` columns of this level now lack one entry less.
            state = (*lower[:-1], lower[-1] + used, lacking[level] - used)
            yield state, ways * math.comb(lacking[level], used)


def _log10_choose(total: int, kept: int) -> float:
    return (math.lgamma(total + 1) - math.lgamma(kept + 1) - math.lgamma(total - kept + 1)) / math.log(10)
