"""From a tensor's histogram to its range: how large a magnitude INT8 must still represent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from maskplan.calibration.histogram import Histogram
from maskplan.calibration.scales import LARGEST_INTEGER, SMALLEST_SCALE
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.validation import above

METHODS = ("minmax", "percentile", "entropy", "mse")

# Entropy: the levels that the values between -amax and amax are merged to, and what a bin of none is taken for.
_LEVELS = 128
_SMOOTHING = 1e-4
# MSE: candidates are this far apart, as a factor, and go down to 2**-7 of the largest magnitude.
_RATIO = 2 ** (1 / 16)
_CANDIDATES = 7 * 16


@dataclass(frozen=True)
class RangeOptions:
    """How a range is chosen.

    Attributes:
        method: `minmax`: the largest magnitude. `percentile`: what that share of the magnitudes does not exceed. `entropy`:
            where the merged distribution differs least from the whole one, by the Kullback-Leibler divergence. `mse`: where
            quantization has the least mean squared error.
        percentile: In percent; for `percentile` only.
        bins: From -amax to amax; for `entropy` only. An even number, at least 128.
    """

    method: str = "entropy"
    percentile: float = 99.99
    bins: int = 2048

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(
                "no such method", where="method", found=self.method, fix=f"choose from {', '.join(METHODS)}"
            )
        above(0, percentile=self.percentile)
        if self.percentile > 100:
            raise InputError(f"percentile is {self.percentile}", fix="give a number of at most 100")
        if self.bins < _LEVELS or self.bins % 2:
            raise InputError(f"bins is {self.bins}", fix=f"give an even number of at least {_LEVELS}")


@dataclass(frozen=True)
class Ranges:
    """Of a model's tensors, by name.

    Attributes:
        amax: The largest magnitude to represent.
        largest: The largest that was seen; empty where ranges came from elsewhere.
    """

    amax: Mapping[str, float]
    largest: Mapping[str, float]


def amax_of(histogram: Histogram, options: RangeOptions) -> float:
    """The range of a tensor; at most its largest magnitude, and 0 only where all values are 0.

    Raises:
        ValueError: The histogram is empty, or saw NaN or infinity.
    """
    if not (histogram.finite and histogram.count):
        raise ValueError("no range without finite values")
    if histogram.amax == 0 or options.method == "minmax":
        return histogram.amax
    if options.method == "percentile":
        return _percentile(histogram, options.percentile)
    if options.method == "entropy":
        return _entropy(histogram, options.bins)
    return _mse(histogram)


def _percentile(histogram: Histogram, percentile: float) -> float:
    # Counted in whole numbers: 99.99 / 100 is not a float.
    wanted = math.ceil(Fraction(str(percentile)) * histogram.count / 100)
    place = int(np.searchsorted(np.cumsum(histogram.magnitudes()), max(wanted, 1)))
    return min((place + 1) * histogram.width, histogram.amax)


def _entropy(histogram: Histogram, bins: int) -> float:
    """The range that ONNX Runtime's entropy calibrator chooses, up to how bins are cut.

    After S. Migacz, 8-bit Inference with TensorRT (GTC 2017), as onnxruntime.quantization.calibrate has it: a candidate is
    the 2i + 1 bins around 0. What lies outside is counted in the outermost bins of the reference, and not at all in what
    is merged to 128 levels.
    """
    counts = histogram.spread(bins)
    below = np.concatenate([[0], np.cumsum(counts)])
    middle = bins // 2
    divergences = [
        _divergence(counts, below, middle - i, min(middle + i + 1, bins)) for i in range(_LEVELS // 2, middle + 1)
    ]
    i = int(np.argmin(divergences)) + _LEVELS // 2
    edge = 2 * histogram.amax / bins
    lowest, highest = max(-i * edge, histogram.lowest), min((i + 1) * edge, histogram.highest)
    return max(abs(lowest), abs(highest))


def _divergence(counts: npt.NDArray[np.int64], below: npt.NDArray[np.int64], start: int, end: int) -> float:
    reference = counts[start:end].copy()
    reference[0] += below[start]
    reference[-1] += below[-1] - below[end]
    merged = reference.size // _LEVELS
    limits = start + merged * np.arange(_LEVELS + 1)
    limits[-1] = end
    mass = np.diff(below[limits])
    filled = np.count_nonzero(reference[: merged * _LEVELS].reshape(_LEVELS, merged), axis=1)
    levels = np.where(filled > 0, mass // np.maximum(filled, 1), 0)
    # Bins that 128 does not divide get nothing back, although the last level counts them.
    candidate = np.zeros_like(reference)
    candidate[: merged * _LEVELS] = np.repeat(levels, merged)
    if not candidate.any():
        return math.inf
    p, q = _smooth(reference), _smooth(candidate)
    p /= p.sum()
    q /= q.sum()
    return float(np.sum(p * np.log(p / q)))


def _smooth(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    # Bins of none get a little, which the others give up: the divergence has no zeros in it.
    filled = np.count_nonzero(counts)
    return np.where(counts > 0, counts - _SMOOTHING * (counts.size - filled) / filled, _SMOOTHING)


def _mse(histogram: Histogram) -> float:
    """The candidate of least squared error among those that are certainly no worse than the largest magnitude.

    The histogram knows each value to half a width. How far a value lies from the nearest integer times the scale changes
    no faster than the value, so the root of the summed squares, taken at the bins' centers, is wrong by at most half a
    width times the root of how many were summed (Minkowski). A candidate must be better by that much twice. Values that
    both scales round to 0 are left out of both sums: their errors are the same.

    This holds for scales kept in float32; an FP16 copy of the scale moves the range by up to 0.05 %.
    """
    counts = histogram.magnitudes()
    filled = np.flatnonzero(counts)
    weights = counts[filled].astype(np.float64)
    lower = filled.astype(np.float64) * histogram.width
    centers, upper = lower + histogram.width / 2, lower + histogram.width
    # An eighth more than half a width pays for float32: rounding of the scale and in QuantizeLinear.
    slack = histogram.width * 0.5 * 1.125
    amax = histogram.amax
    widest = _tail_sums(weights * _errors(centers, amax) ** 2)
    numbers = _tail_sums(weights)
    best, gain = amax, 0.0
    for i in range(1, _CANDIDATES + 1):
        candidate = amax * _RATIO**-i
        first = int(np.searchsorted(upper, _scale(candidate) / 2, side="right"))
        # Sums without BLAS, whose threads cost more than they bring here.
        squares = weights[first:] * _errors(centers[first:], candidate) ** 2
        error = float(squares.sum())
        certain = math.sqrt(error) + 2 * slack * math.sqrt(numbers[first]) <= math.sqrt(widest[first])
        if certain and widest[first] - error > gain:
            best, gain = candidate, widest[first] - error
        # What is clipped costs more with every smaller candidate.
        if squares[np.searchsorted(centers[first:], candidate) :].sum() > widest[0]:
            break
    return best


def _errors(magnitudes: npt.NDArray[np.float64], amax: float) -> npt.NDArray[np.float64]:
    scale = _scale(amax)
    return magnitudes - scale * np.minimum(np.rint(magnitudes / scale), LARGEST_INTEGER)


def _scale(amax: float) -> float:
    return max(amax / LARGEST_INTEGER, SMALLEST_SCALE)


def _tail_sums(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sums from each place to the end; one more than there are values, the last of them 0."""
    return np.append(np.cumsum(values[::-1])[::-1], 0.0)
