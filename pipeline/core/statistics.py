"""Paired proportions: intervals of their difference, McNemar's test, and how many images an interval needs."""

from __future__ import annotations

import math
from collections.abc import Callable
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


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's exact test: images that one model alone got right, as tosses of a fair coin."""
    tosses, fewer = only_first + only_second, min(only_first, only_second)
    if 2 * fewer >= tosses:
        return 1.0
    whole = math.lgamma(tosses + 1) - tosses * math.log(2)
    tail = math.fsum(math.exp(whole - math.lgamma(k + 1) - math.lgamma(tosses - k + 1)) for k in range(fewer + 1))
    return min(2 * tail, 1.0)


def best_drop_limit(images: int, accuracy: float) -> float:
    """Upper limit of the drop, in points, when two models of this accuracy in [0, 1] agree on every one of the images."""
    right = round(accuracy * images)
    return drop_interval(PairedCounts(right, 0, 0, images - right))[1]


def fewest(images_suffice: Callable[[int], bool], most: int = 10**9) -> int | None:
    """The smallest number of images for which a condition holds that more images can only help; None beyond `most`."""
    high = 1
    while not images_suffice(high):
        if high > most:
            return None
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if images_suffice(middle) else (middle, high)
    return high


def wilson(successes: int, trials: int, z: float = _Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion."""
    p = successes / trials
    center = p + z * z / (2 * trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max((center - half) / scale, 0.0), min((center + half) / scale, 1.0)


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
