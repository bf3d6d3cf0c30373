"""Statistical bounds from held-out images, valid for any network and data (lemma L8)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.statistics import binomial_cdf, clopper_pearson_upper


def flip_rate_limit(flips: int, images: int, confidence: float = 0.95) -> float:
    """Upper confidence bound of the rate at which two models disagree on images of the same distribution.

    The exact one-sided bound of Clopper and Pearson. Zero flips among n images give 1 - 0.05^(1/n) < 3/n at 95%.

    Args:
        flips: Number of images on which the models disagree.
        images: Number of images; independent, and none of them used for choosing masks or statistics.
        confidence: Between 0 and 1.
    """
    return clopper_pearson_upper(flips, images, confidence)


def quantile_limit(
    values: npt.ArrayLike, quantile: float, confidence: float = 0.95, *, highest: float = math.inf
) -> float:
    """Upper confidence bound of a quantile, valid for any distribution of the values.

    The r-th smallest of n values is below the q-quantile only if at least r values are, each with probability at most q. So
    it is a bound as soon as P(Bin(n, q) < r) reaches the confidence; the smallest such r is used.

    Args:
        values: (n,), independent; for instance the total variation of each image.
        quantile: q, between 0 and 1.
        confidence: Between 0 and 1.
        highest: Upper limit of all possible values; returned if even the largest value is no bound, that is, if q^n exceeds
            1 - confidence.

    Raises:
        ValueError: There are no values, one is not finite, or a probability is not between 0 and 1.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    count = len(ordered)
    if not (0 < quantile < 1 and count and np.isfinite(ordered).all() and 0 < confidence < 1):
        raise ValueError(f"no quantile {quantile} of {count} finite values at confidence {confidence}")
    if quantile**count > 1 - confidence:
        return highest
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        if binomial_cdf(middle - 1, count, quantile) >= confidence:
            high = middle
        else:
            low = middle
    return float(ordered[high - 1])
