"""Mask diversity: how many masks a kind of sparsity allows (Hubara et al. 2021), as they count and as it is.

The paper holds that a kind of sparsity with more masks costs less accuracy. Of T weights with the share N/M kept there are

- unstructured: T choose T N/M;
- N:M: (M choose N)^(T/M);
- transposable N:M: c^(T/M^2), where c is the number of M x M tiles with N in every row and column.

For c the paper gives M! (M-1)! ... (M-N+1)! with N the zeros of a group, which counts tiles more than once: 144 for 2:4
where there are 90, and 1.76e13 for 4:8 where there are 116,963,796,250. Both are here, and every number says which it is:
by the paper's formula transposable 4:8 has more masks than 2:4 along one axis, by the exact count it has fewer.
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
    """How many masks there are, as logarithms to the base of ten: products over layers are sums.

    Attributes:
        weights: How many are masked.
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
    """The diversity of masks that keep exactly N of M, for weights of these sizes together.

    Unstructured masks choose among the weights of all layers at once, as magnitude over a whole network does.

    Args:
        weights: Numbers of weights, each a multiple of M * M.
        pattern: N:M. The exact count takes a second at 6:12, about a minute at 8:16, and is out of reach far beyond.

    Raises:
        InputError: Not 1 <= N <= M, or sizes that hold no whole number of tiles.
    """
    n, m = pattern.n, pattern.m
    _require(pattern)
    sizes = list(weights)
    wrong = [size for size in sizes if size < 0 or size % (m * m)]
    if wrong:
        raise InputError(
            f"{len(wrong)} of {len(sizes)} weights hold no whole number of {m}x{m} tiles",
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
    """How many M x M tiles have exactly N in every row and column: 90 for 2:4, 116,963,796,250 for 4:8.

    Rows are placed one after the other. All that matters of those before is how many columns lack 0, 1, ... N more, so a
    state is those N+1 counts.

    Raises:
        InputError: Not 1 <= N <= M.
    """
    _require(pattern)
    n, m = pattern.n, pattern.m
    if 2 * n > m:
        # What is dropped is such a tile too, with fewer states.
        n = m - n
    states = Counter({(0,) * n + (m,): 1})
    for _ in range(m):
        after: Counter[tuple[int, ...]] = Counter()
        for lacking, ways in states.items():
            for state, placings in _placed(lacking, n):
                after[state] += ways * placings
        states = after
    return states[(m,) + (0,) * n]


def tile_masks_by_paper(pattern: Pattern) -> int:
    """The paper's count of the same, M! (M-1)! ... (M-Z+1)! with Z = M-N zeros in a group; more than there are.

    Raises:
        InputError: Not 1 <= N <= M.
    """
    _require(pattern)
    return math.prod(math.factorial(pattern.m - i) for i in range(pattern.m - pattern.n))


def _require(pattern: Pattern) -> None:
    if not 1 <= pattern.n <= pattern.m:
        raise InputError("no mask keeps that", found=f"the pattern {pattern}", fix="N is at least 1 and at most M")


def _placed(lacking: tuple[int, ...], left: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Put what is left of a row into columns that lack some: what columns lack then, and in how many ways."""
    level = len(lacking) - 1
    if level == 0:
        if left == 0:
            yield lacking, 1
        return
    for used in range(min(lacking[level], left) + 1):
        for lower, ways in _placed(lacking[:level], left - used):
            # These columns now lack one less.
            moved = (*lower[:-1], lower[-1] + used, lacking[level] - used)
            yield moved, ways * math.comb(lacking[level], used)


def _log10_choose(total: int, kept: int) -> float:
    return (math.lgamma(total + 1) - math.lgamma(kept + 1) - math.lgamma(total - kept + 1)) / math.log(10)
