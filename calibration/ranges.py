"""The range of a tensor from its histogram: the largest magnitude that INT8 represents; larger ones saturate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from maskplan.calibration.histogram import Histogram
from maskplan.calibration.scales import MAX_INT8, MIN_SCALE
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.validation import above

RangeMethod = Literal["minmax", "percentile", "entropy", "mse"]
METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)

# Entropy: the number of levels to which a candidate is quantized, and the mass given to empty bins.
_LEVELS = 128
_SMOOTHING = 1e-4
# MSE: the ratio between candidates, which go down to 2**-7 of the largest magnitude.
_RATIO = 2 ** (1 / 16)
_CANDIDATES = 7 * 16


@dataclass(frozen=True)
class RangeOptions:
    """How a range is chosen.

    Attributes:
        method: `minmax`: the largest magnitude. `percentile`: the percentile of the magnitudes. `entropy`: the range whose
            quantized distribution has the least Kullback-Leibler divergence from the measured one. `mse`: the range with
            the least mean squared error of quantization. Entropy, TensorRT's own method, cost CIFAR-10 networks points of
            accuracy that the others did not (docs/results.md).
        percentile: In percent; for `percentile` only.
        bins: Between -amax and amax; for `entropy` only. An even number, at least 128.
    """

    method: RangeMethod = "mse"
    percentile: float = 99.99
    bins: int = 2048

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(
                "unknown calibration method", where="method", found=self.method, fix=f"choose from {', '.join(METHODS)}"
            )
        above(0, percentile=self.percentile)
        if self.percentile > 100:
            raise InputError(f"percentile is {self.percentile}", fix="give a number of at most 100")
        if self.bins < _LEVELS or self.bins % 2:
            raise InputError(f"bins is {self.bins}", fix=f"give an even number of at least {_LEVELS}")


@dataclass(frozen=True)
class Ranges:
    """Ranges of a model's tensors, by name.

    Attributes:
        amax: The largest magnitude to represent.
        largest: The largest magnitude measured; empty for imported ranges.
    """

    amax: Mapping[str, float]
    largest: Mapping[str, float]


def amax_of(histogram: Histogram, options: RangeOptions) -> float:
    """The range of a tensor: at most its largest magnitude, and 0 only if all values are 0.

    Raises:
        ValueError: The histogram is empty, or its tensor had NaN or infinity.
    """
    if not (histogram.finite and histogram.count):
        raise ValueError("the histogram has no values, or values that are not finite")
    if histogram.amax == 0 or options.method == "minmax":
        return histogram.amax
    if options.method == "percentile":
        return _percentile(histogram, options.percentile)
    if options.method == "entropy":
        return _entropy(histogram, options.bins)
    return _mse(histogram)


def _percentile(histogram: Histogram, percentile: float) -> float:
    # In exact fractions: 99.99 / 100 is not a float.
    rank = math.ceil(Fraction(str(percentile)) * histogram.count / 100)
    index = int(np.searchsorted(np.cumsum(histogram.magnitudes()), max(rank, 1)))
    return min((index + 1) * histogram.width, histogram.amax)


def _entropy(histogram: Histogram, bins: int) -> float:
    """The range that ONNX Runtime's entropy calibrator selects, up to the division into bins.

    After S. Migacz, 8-bit Inference with TensorRT (GTC 2017), as implemented in onnxruntime.quantization.calibrate:
    candidate i consists of the 2i + 1 bins around 0. Values outside of them are added to the outermost bins of the
    reference, but not to the distribution that is quantized to 128 levels.
    """
    counts = histogram.spread(bins)
    # below[i]: the number of values in the bins before bin i.
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
    """KL divergence of the bins start to end, with the outliers, from the same bins quantized to 128 levels."""
    reference = counts[start:end].copy()
    reference[0] += below[start]
    reference[-1] += below[-1] - below[end]
    # Bins per level; the last level takes the remainder.
    merged = reference.size // _LEVELS
    limits = start + merged * np.arange(_LEVELS + 1)
    limits[-1] = end
    mass = np.diff(below[limits])
    # Each level spreads its mass evenly over its non-empty bins.
    filled = np.count_nonzero(reference[: merged * _LEVELS].reshape(_LEVELS, merged), axis=1)
    levels = np.where(filled > 0, mass // np.maximum(filled, 1), 0)
    # As in ONNX Runtime, the remaining bins stay empty, although the last level counts them.
    candidate = np.zeros_like(reference)
    candidate[: merged * _LEVELS] = np.repeat(levels, merged)
    if not candidate.any():
        return math.inf
    p, q = _smooth(reference), _smooth(candidate)
    p /= p.sum()
    q /= q.sum()
    return float(np.sum(p * np.log(p / q)))


def _smooth(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    # Move a little mass from the other bins to the empty ones: the divergence is not defined for zeros.
    filled = np.count_nonzero(counts)
    return np.where(counts > 0, counts - _SMOOTHING * (counts.size - filled) / filled, _SMOOTHING)


def _mse(histogram: Histogram) -> float:
    """The candidate with the least squared error among those that are certainly no worse than the largest magnitude.

    The histogram gives each value to within half a bin width w / 2. The rounding error of a value, its distance from
    the nearest multiple of the scale, changes no faster than the value itself. So for n values the root of the summed
    squared errors, computed at the bin centers, is off by at most (w / 2) sqrt(n) (Minkowski's inequality). A candidate
    must beat the largest magnitude by twice this bound, once for each of the two sums. Values that both scales round to
    0 are omitted from both sums, because their errors are the same; this keeps n, and with it the bound, small.

    This holds for scales in float32; storing the scale in FP16 changes the range by up to 0.05 %.
    """
    counts = histogram.magnitudes()
    filled = np.flatnonzero(counts)
    weights = counts[filled].astype(np.float64)
    lower = filled.astype(np.float64) * histogram.width
    centers, upper = lower + histogram.width / 2, lower + histogram.width
    # Half a width, and an eighth more for rounding in float32: of the scale, and in QuantizeLinear.
    slack = histogram.width * 0.5 * 1.125
    amax = histogram.amax
    # At the full range: squared errors of the bins from each index on, and the number of their values.
    full_range = _tail_sums(weights * _errors(centers, amax) ** 2)
    value_counts = _tail_sums(weights)
    best, gain = amax, 0.0
    for i in range(1, _CANDIDATES + 1):
        candidate = amax * _RATIO**-i
        # Bins before this one are rounded to 0 by both scales.
        first = int(np.searchsorted(upper, _scale(candidate) / 2, side="right"))
        # Not a dot product: the threads of BLAS would cost more than they save here.
        squares = weights[first:] * _errors(centers[first:], candidate) ** 2
        error = float(squares.sum())
        certain = math.sqrt(error) + 2 * slack * math.sqrt(value_counts[first]) <= math.sqrt(full_range[first])
        if certain and full_range[first] - error > gain:
            best, gain = candidate, full_range[first] - error
        # Smaller candidates clip more: once clipping alone costs more than the full range, none of them can win.
        if squares[np.searchsorted(centers[first:], candidate) :].sum() > full_range[0]:
            break
    return best


def _errors(magnitudes: npt.NDArray[np.float64], amax: float) -> npt.NDArray[np.float64]:
    scale = _scale(amax)
    return magnitudes - scale * np.minimum(np.rint(magnitudes / scale), MAX_INT8)


def _scale(amax: float) -> float:
    return max(amax / MAX_INT8, MIN_SCALE)


def _tail_sums(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sums from each index to the end, (n,) to (n + 1,); the last one is 0."""
    return np.append(np.cumsum(values[::-1])[::-1], 0.0)
