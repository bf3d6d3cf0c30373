"""The windows of a pooling: how many contain one value, and the Lipschitz constants that follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Windows:
    """The windows along one axis.

    Attributes:
        coverage: The largest number of windows that contain one value.
        min_values: The smallest number of values in a window, at least 1.
        min_divisor: The same with padding included, up to where torch counts it: the smallest divisor of a mean.
    """

    coverage: int
    min_values: int
    min_divisor: int

    @classmethod
    def strided(cls, length: int, windows: int, kernel: int, stride: int, padding: int, dilation: int) -> Windows:
        """Windows of a pooling with stride.

        Args:
            length: Values along the axis.
            windows: Number of windows (with `ceil_mode`, the last may extend beyond the padding).
            kernel: Values per window.
            stride: Distance of windows.
            padding: On each side.
            dilation: Distance of values in a window.
        """
        positions = [
            range(w * stride - padding, w * stride - padding + kernel * dilation, dilation) for w in range(windows)
        ]
        values = [[i for i in window if 0 <= i < length] for window in positions]
        # Beyond the padding on the right, which only `ceil_mode` reaches, torch does not count positions.
        divisors = [sum(i < length + padding for i in window) for window in positions]
        return cls._of(length, values, divisors)

    @classmethod
    def adaptive(cls, length: int, windows: int) -> Windows:
        """Windows of an adaptive pooling of `length` values to `windows` values."""
        values = [list(range(w * length // windows, -(-(w + 1) * length // windows))) for w in range(windows)]
        return cls._of(length, values, [len(window) for window in values])

    @classmethod
    def _of(cls, length: int, values: Sequence[Sequence[int]], divisors: Sequence[int]) -> Windows:
        times = [0] * length
        for window in values:
            for i in window:
                times[i] += 1
        return cls(max(times), max(min(map(len, values)), 1), max(min(divisors), 1))


def max_pool_constant(axes: Sequence[Windows]) -> float:
    """Lipschitz constant of max-pooling: a value that is the largest in all its windows is copied into each of them."""
    return math.sqrt(math.prod(axis.coverage for axis in axes))


def average_pool_constant(axes: Sequence[Windows], *, padded: bool) -> float:
    """Lipschitz constant of average pooling: by Cauchy-Schwarz, a mean of n values is at most 1/sqrt(n) of their norm.

    Args:
        axes: The windows along each axis.
        padded: Padding counts as values (`count_include_pad`).
    """
    smallest = math.prod(axis.min_divisor if padded else axis.min_values for axis in axes)
    return max_pool_constant(axes) / math.sqrt(smallest)
