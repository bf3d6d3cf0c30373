"""Confidence intervals for paired proportions."""

from __future__ import annotations

import math
from dataclasses import dataclass

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class PairedCounts:
    """Images by who got them right: both, only the first model, only the second, neither."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def images(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def drop(self) -> float:
        """First accuracy minus second, in points."""
        return 100 * (self.only_first - self.only_second) / self.images


def drop_interval(counts: PairedCounts, z: float = _Z95) -> tuple[float, float]:
    """Interval of the drop in points: square-and-add of Wilson's limits with correlation (Newcombe 1998, method 10)."""
    n = counts.images
    right1, right2 = counts.both + counts.only_first, counts.both + counts.only_second
    p1, p2 = right1 / n, right2 / n
    (low1, high1), (low2, high2) = wilson(right1, n, z), wilson(right2, n, z)
    phi = _phi(counts)
    difference = p1 - p2
    down = (p1 - low1) ** 2 - 2 * phi * (p1 - low1) * (high2 - p2) + (high2 - p2) ** 2
    up = (high1 - p1) ** 2 - 2 * phi * (high1 - p1) * (p2 - low2) + (p2 - low2) ** 2
    return 100 * (difference - math.sqrt(max(down, 0))), 100 * (difference + math.sqrt(max(up, 0)))


def wilson(successes: int, trials: int, z: float = _Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion."""
    p = successes / trials
    centre = p + z * z / (2 * trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)


def _phi(c: PairedCounts) -> float:
    """Correlation of the two models' hits, with Newcombe's continuity correction."""
    margins = (
        (c.both + c.only_first) * (c.only_second + c.neither) * (c.both + c.only_second) * (c.only_first + c.neither)
    )
    if margins == 0:
        return 0.0
    cross = float(c.both * c.neither - c.only_first * c.only_second)
    if cross > 0:
        cross = max(cross - c.images / 2, 0.0)
    return cross / math.sqrt(margins)
