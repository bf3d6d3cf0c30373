"""Bootstrap intervals over samples: of means, of ratios of sums, and of any function of a set of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_RESAMPLES, _SEED = 1000, 1
# Elements of the matrix of counts that is in memory at once.
_MAX_COUNTS = 1 << 22


def ratio_interval(numerator: Floats, denominator: Floats) -> tuple[float, float] | None:
    """95% interval of sum(numerator) / sum(denominator), pairs resampled; None for fewer than two pairs.

    The mean of `numerator` is this ratio with a denominator of ones.
    """
    if len(numerator) < 2:
        return None
    ratios = []
    for counts in _counts(len(numerator)):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append((counts @ numerator) / (counts @ denominator))
    return _interval(np.concatenate(ratios))


def paired_interval(
    difference: Callable[[npt.NDArray[np.int64]], float], samples: int, resamples: int = _RESAMPLES
) -> tuple[float, float] | None:
    """95% interval of a function of a set of samples, given by their positions, some of them more than once."""
    if samples < 2:
        return None
    generator = np.random.default_rng(_SEED)
    return _interval(np.array([difference(generator.integers(0, samples, samples)) for _ in range(resamples)]))


def _counts(samples: int) -> Iterator[Floats]:
    """How often each sample is drawn in each resample, some resamples at a time."""
    generator = np.random.default_rng(_SEED)
    step = max(1, _MAX_COUNTS // samples)
    for start in range(0, _RESAMPLES, step):
        rows = min(step, _RESAMPLES - start)
        yield generator.multinomial(samples, np.full(samples, 1 / samples), size=rows).astype(np.float64)


def _interval(values: Floats) -> tuple[float, float] | None:
    if not np.isfinite(values).all():
        return None
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)
