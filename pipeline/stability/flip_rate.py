"""What images that the masks were not chosen on say of all such images: limits that hold for any network and data."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

# Of a continued fraction; it needs about the square root of the number of trials.
_MOST_TERMS = 100_000
_TINY = 1e-300


def flip_rate_limit(flips: int, images: int, confidence: float = 0.95) -> float:
    """The rate at which two models disagree on images of the kind is no higher, with this confidence.

    One-sided, after Clopper and Pearson: exact, so never too sure. No flips among n images give 1 - 0.05^(1/n), which is
    below 3 / n, at 95%.

    Args:
        flips: Of the images, those on which the models disagree.
        images: Independent, and none of those that shaped the masks.
        confidence: Between 0 and 1.
    """
    _require(flips, images, confidence)
    return _upper(flips, images, 1 - confidence)


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a proportion (Clopper and Pearson 1934): each side errs with at most half the rest."""
    _require(successes, trials, confidence)
    error = (1 - confidence) / 2
    return 1 - _upper(trials - successes, trials, error), _upper(successes, trials, error)


def quantile_limit(
    values: npt.ArrayLike, quantile: float, confidence: float = 0.95, *, highest: float = math.inf
) -> float:
    """A quantile of what the values were drawn from is no higher, with this confidence, whatever the distribution.

    The r-th smallest of n values is below the quantile only if at least r values are, and each is with probability q at
    most. So it is a limit as soon as P(Bin(n, q) < r) reaches the confidence; the smallest such r is taken.

    Args:
        values: (n,), independent; for instance the total variation of every image.
        quantile: q, between 0 and 1.
        confidence: Between 0 and 1.
        highest: What no value can exceed: the limit where even the largest of so few values is none, that is, where q^n is
            more than 1 - confidence.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    count = len(ordered)
    if not (0 < quantile < 1 and count and np.isfinite(ordered).all()):
        raise ValueError(f"no quantile {quantile} of {count} finite values")
    _require(0, count, confidence)
    if quantile**count > 1 - confidence:
        return highest
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        if _at_most(middle - 1, count, quantile) >= confidence:
            high = middle
        else:
            low = middle
    return float(ordered[high - 1])


def _require(successes: int, trials: int, confidence: float) -> None:
    if not (0 <= successes <= trials and trials > 0 and 0 < confidence < 1):
        raise ValueError(f"no proportion {successes} of {trials} at confidence {confidence}")


def _upper(successes: int, trials: int, error: float) -> float:
    """The rate at which so few successes or fewer have the probability `error`."""
    if successes == trials:
        return 1.0
    if successes == 0:
        return -math.expm1(math.log(error) / trials)
    return _first(lambda rate: _at_most(successes, trials, rate) <= error, successes / trials, 1.0)


def _first(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The lowest float from which it holds, known to hold at `high`."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _at_most(successes: int, trials: int, rate: float) -> float:
    """P(Bin(trials, rate) <= successes), for 0 <= successes < trials, as a regularized incomplete beta function."""
    a, b = float(trials - successes), successes + 1.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log1p(-rate) + b * math.log(rate))
    # The fraction of each converges fast on its own side of the mean.
    if 1 - rate < (a + 1) / (a + b + 2):
        return front * _fraction(a, b, 1 - rate) / a
    return 1 - front * _fraction(b, a, rate) / b


def _fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function, from its front (Lentz' method; DLMF 8.17.22)."""
    c, d = 1.0, 1 / _away(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, _MOST_TERMS):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away(1 + numerator * d)
            c = _away(1 + numerator / c)
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            return value
    raise ArithmeticError(f"no value of the incomplete beta function at a={a}, b={b}, x={x}")


def _away(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
