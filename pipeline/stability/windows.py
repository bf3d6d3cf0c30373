"""How often a pooling looks at a value, and what follows for its Lipschitz constant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Windows:
    """Those of a pooling along one axis.

    Attributes:
        coverage: In how many windows a value lies at most.
        values: How many values a window has at least.
        counted: The same with padding.
    """

    coverage: int
    values: int
    counted: int

    @classmethod
    def strided(cls, length: int, windows: int, kernel: int, stride: int, padding: int, dilation: int) -> Windows:
        reached = [
            range(w * stride - padding, w * stride - padding + kernel * dilation, dilation) for w in range(windows)
        ]
        inside = [[i for i in window if 0 <= i < length] for window in reached]
        counted = [sum(i < length + padding for i in window) for window in reached]
        return cls._of(length, inside, counted)

    @classmethod
    def adaptive(cls, length: int, windows: int) -> Windows:
        inside = [list(range(w * length // windows, -(-(w + 1) * length // windows))) for w in range(windows)]
        return cls._of(length, inside, [len(window) for window in inside])

    @classmethod
    def _of(cls, length: int, inside: Sequence[Sequence[int]], counted: Sequence[int]) -> Windows:
        times = [0] * length
        for window in inside:
            for i in window:
                times[i] += 1
        return cls(max(times), max(min(map(len, inside)), 1), max(min(counted), 1))


def max_pool_factor(axes: Sequence[Windows]) -> float:
    """Lipschitz constant of max-pooling: a value that is the largest in all its windows is copied into each."""
    return math.sqrt(math.prod(axis.coverage for axis in axes))


def average_pool_factor(axes: Sequence[Windows], *, padded: bool) -> float:
    """Of average pooling: by Cauchy-Schwarz, a mean of n values is at most 1/sqrt(n) of their norm."""
    smallest = math.prod(axis.counted if padded else axis.values for axis in axes)
    return max_pool_factor(axes) / math.sqrt(smallest)
