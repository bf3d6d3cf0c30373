"""Intervals of proportions and of paired differences, McNemar's test, and how many images an interval needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_Z95 = 1.959963984540054

# Terms of the continued fraction; about the square root of the number of trials is needed.
_MAX_TERMS = 100_000
_TINY = 1e-300


@dataclass(frozen=True)
class PairedCounts:
    """Images by which model classified them correctly: both, only the first, only the second, neither."""

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
    """Two-sided p of McNemar's exact test on the images that only one of the models classified correctly."""
    # Under equal accuracies each of these images is the toss of a fair coin; logarithms, since 2**tosses overflows.
    tosses, fewer = only_first + only_second, min(only_first, only_second)
    if 2 * fewer >= tosses:
        return 1.0
    log_scale = math.lgamma(tosses + 1) - tosses * math.log(2)
    tail = math.fsum(math.exp(log_scale - math.lgamma(k + 1) - math.lgamma(tosses - k + 1)) for k in range(fewer + 1))
    return min(2 * tail, 1.0)


def best_drop_limit(images: int, accuracy: float) -> float:
    """Upper limit of the drop's interval, in points, for two models of this accuracy in [0, 1] that agree on every image."""
    right = round(accuracy * images)
    return drop_interval(PairedCounts(right, 0, 0, images - right))[1]


def min_images(images_suffice: Callable[[int], bool], max_images: int = 10**9) -> int | None:
    """The smallest number of images that meets a condition which more images can only help; None above `max_images`."""
    high = 1
    while not images_suffice(high):
        if high > max_images:
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


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a proportion (Clopper and Pearson 1934).

    Each end errs with a probability of at most (1 - confidence) / 2.

    Raises:
        ValueError: Not 0 <= successes <= trials, no trials, or a confidence outside (0, 1).
    """
    _require_proportion(successes, trials, confidence)
    error = (1 - confidence) / 2
    return 1 - _upper(trials - successes, trials, error), _upper(successes, trials, error)


def clopper_pearson_upper(successes: int, trials: int, confidence: float = 0.95) -> float:
    """The exact one-sided upper limit of a proportion: it is too low with a probability of at most 1 - confidence.

    Raises:
        ValueError: As `clopper_pearson`.
    """
    _require_proportion(successes, trials, confidence)
    return _upper(successes, trials, 1 - confidence)


def binomial_cdf(successes: int, trials: int, rate: float) -> float:
    """P(Bin(trials, rate) <= successes), for 0 <= successes < trials, as a regularized incomplete beta function."""
    a, b = float(trials - successes), successes + 1.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log1p(-rate) + b * math.log(rate))
    # The fraction of each converges fast on its own side of the mean.
    if 1 - rate < (a + 1) / (a + b + 2):
        return front * _beta_continued_fraction(a, b, 1 - rate) / a
    return 1 - front * _beta_continued_fraction(b, a, rate) / b


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


def _require_proportion(successes: int, trials: int, confidence: float) -> None:
    if not (0 <= successes <= trials and trials > 0 and 0 < confidence < 1):
        raise ValueError(f"no proportion {successes} of {trials} at confidence {confidence}")


def _upper(successes: int, trials: int, error: float) -> float:
    """The rate at which so few successes or fewer have the probability `error`."""
    if successes == trials:
        return 1.0
    if successes == 0:
        return -math.expm1(math.log(error) / trials)
    return _bisect_float(lambda rate: binomial_cdf(successes, trials, rate) <= error, successes / trials, 1.0)


def _bisect_float(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The lowest float from which it holds, known to hold at `high`."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _beta_continued_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function, from its front (Lentz' method; DLMF 8.17.22)."""
    c, d = 1.0, 1 / _avoid_zero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, _MAX_TERMS):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _avoid_zero(1 + numerator * d)
            c = _avoid_zero(1 + numerator / c)
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            return value
    raise ArithmeticError(f"no value of the incomplete beta function at a={a}, b={b}, x={x}")


def _avoid_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
