"""How the values of one tensor are spread: a histogram that takes any number of batches in memory that does not grow."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

HALF_BINS = 1 << 15
"""Bins on either side of 0. The largest magnitude always lies in the outer half of them."""

# In this many values the scratch arrays stay in a core's cache.
_BLOCK = 1 << 15
# The scale 2**-exponent must be a float32 number.
_SMALLEST_EXPONENT = -126


class Histogram:
    """Counts of values in bins of one width, a power of two; bin i holds [i * width, (i + 1) * width).

    The width follows from the largest magnitude seen: when a larger one comes, neighboring bins merge. Widths that are
    powers of two make scaling and merging exact, so the order of the values and how they came in batches change nothing.

    Attributes:
        counts: Bins -HALF_BINS to HALF_BINS - 1, int64.
        exponent: The width is 2**exponent.
        count: How many values were seen.
        lowest: The smallest of them, exactly; infinity before the first.
        highest: The largest; -infinity before the first.
        finite: False once NaN or infinity came; nothing is counted from then on.
    """

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(2 * HALF_BINS, np.int64)
        self.exponent = _SMALLEST_EXPONENT
        self.count = 0
        self.lowest, self.highest = math.inf, -math.inf
        self.finite = True

    @property
    def width(self) -> float:
        """Of a bin."""
        return 2.0**self.exponent

    @property
    def amax(self) -> float:
        """The largest magnitude, exactly; 0 before the first value."""
        # Zeros may be negative; a range is not.
        return abs(max(self.highest, -self.lowest, 0.0))

    def update(self, values: npt.NDArray[Any]) -> None:
        """Count float32 or FP16 values of any shape.

        What underflows in float32 when it is divided by the width counts as 0.
        """
        flat = np.ascontiguousarray(values).reshape(-1)
        scaled, bins = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.intp)
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK]
            # NaN goes through both.
            lowest, highest = float(block.min()), float(block.max())
            if not (self.finite and math.isfinite(lowest) and math.isfinite(highest)):
                self.finite = False
                return
            self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)
            self._widen(_exponent_of(self.amax))
            self.count += block.size
            places = scaled[: block.size]
            np.multiply(block, np.float32(2.0**-self.exponent), out=places)
            np.floor(places, out=places)
            # Whole numbers below 2**24: still exact.
            np.add(places, np.float32(HALF_BINS), out=places)
            np.copyto(bins[: block.size], places, casting="unsafe")
            np.add.at(self.counts, bins[: block.size], 1)

    def magnitudes(self) -> npt.NDArray[np.int64]:
        """Counts of absolute values: bin i of the HALF_BINS holds those from i * width to (i + 1) * width."""
        counts: npt.NDArray[np.int64] = self.counts[HALF_BINS:] + self.counts[HALF_BINS - 1 :: -1]
        return counts

    def spread(self, bins: int) -> npt.NDArray[np.int64]:
        """The same values in `bins` bins of one width from -amax to amax.

        A bin that an edge of the new ones cuts is shared out in proportion. The end bins end at the exact extremes.

        Args:
            bins: An even number, so that 0 is an edge.
        """
        edges = np.linspace(-self.amax, self.amax, bins + 1)
        own = np.arange(1 - HALF_BINS, HALF_BINS) * self.width
        below = np.cumsum(self.counts)[:-1]
        inside = (own > self.lowest) & (own < self.highest)
        known = np.concatenate([[self.lowest], own[inside], [self.highest]])
        cumulative = np.interp(edges, known, np.concatenate([[0], below[inside], [self.count]]))
        cumulative[0], cumulative[-1] = 0, self.count
        counts: npt.NDArray[np.int64] = np.diff(np.rint(cumulative).astype(np.int64))
        return counts

    def _widen(self, exponent: int) -> None:
        # Bin i goes into bin i >> steps; 15 steps leave one bin on either side.
        steps = min(exponent - self.exponent, HALF_BINS.bit_length() - 1)
        if steps <= 0:
            return
        merged = self.counts.reshape(-1, 1 << steps).sum(axis=1)
        self.counts = np.zeros_like(self.counts)
        half = merged.size // 2
        self.counts[HALF_BINS - half : HALF_BINS + half] = merged
        self.exponent = exponent


def union(histograms: Iterable[Histogram]) -> Histogram:
    """The histogram of all their values together, for tensors that must have one scale."""
    parts = list(histograms)
    whole = Histogram()
    for part in parts:
        whole.count += part.count
        whole.lowest, whole.highest = min(whole.lowest, part.lowest), max(whole.highest, part.highest)
        whole.finite &= part.finite
    whole._widen(_exponent_of(whole.amax))
    for part in parts:
        copy = Histogram()
        copy.counts, copy.exponent = part.counts, part.exponent
        copy._widen(whole.exponent)
        whole.counts += copy.counts
    return whole


def _exponent_of(amax: float) -> int:
    # amax < 2**e, which must be at most HALF_BINS widths.
    return max(math.frexp(amax)[1] - (HALF_BINS.bit_length() - 1), _SMALLEST_EXPONENT)
