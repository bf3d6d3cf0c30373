"""A histogram of the values of one tensor, updated batch by batch in constant memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

HALF_BINS = 1 << 15
"""Bins on either side of 0. The largest magnitude is always in the outer half of them."""

# Values that are counted at once: the scratch arrays stay in the cache of a core.
_BLOCK = 1 << 15
# The scale 2**-exponent must be a float32 number.
_MIN_EXPONENT = -126


class Histogram:
    """Counts of values in bins of one width, a power of two; bin i holds [i * width, (i + 1) * width).

    The width follows from the largest magnitude so far: for a larger one, neighboring bins merge. As widths are powers of
    two, scaling and merging are exact, and the result does not depend on the order of the values or their batches.

    Attributes:
        counts: Bins -HALF_BINS to HALF_BINS - 1, int64.
        exponent: The width is 2**exponent.
        count: Number of values.
        lowest: The smallest value, exactly; infinity before the first.
        highest: The largest value, exactly; -infinity before the first.
        finite: False after a NaN or infinity; nothing is counted from then on.
    """

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(2 * HALF_BINS, np.int64)
        self.exponent = _MIN_EXPONENT
        self.count = 0
        self.lowest, self.highest = math.inf, -math.inf
        self.finite = True

    @property
    def width(self) -> float:
        """The width of a bin."""
        return 2.0**self.exponent

    @property
    def amax(self) -> float:
        """The largest magnitude, exactly; 0 before the first value."""
        # abs, because the result may be -0.0.
        return abs(max(self.highest, -self.lowest, 0.0))

    def update(self, values: npt.NDArray[Any]) -> None:
        """Count float32 or FP16 values of any shape.

        Values that underflow in float32 when divided by the width count as 0.
        """
        flat = np.ascontiguousarray(values).reshape(-1)
        scaled, bins = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.intp)
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK]
            # NaN propagates through min and max.
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
            # Integers below 2**24 are exact in float32.
            np.add(places, np.float32(HALF_BINS), out=places)
            np.copyto(bins[: block.size], places, casting="unsafe")
            np.add.at(self.counts, bins[: block.size], 1)

    def magnitudes(self) -> npt.NDArray[np.int64]:
        """Counts of absolute values, (HALF_BINS,): bin i counts those from i * width to (i + 1) * width."""
        counts: npt.NDArray[np.int64] = self.counts[HALF_BINS:] + self.counts[HALF_BINS - 1 :: -1]
        return counts

    def spread(self, bins: int) -> npt.NDArray[np.int64]:
        """The same values in `bins` equal bins from -amax to amax, (bins,).

        A bin that contains an edge of the new ones is divided in proportion. The outermost bins end at the exact extremes.

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
        # Bin i becomes part of bin i >> steps; 15 steps leave one bin on either side.
        steps = min(exponent - self.exponent, HALF_BINS.bit_length() - 1)
        if steps <= 0:
            return
        merged = self.counts.reshape(-1, 1 << steps).sum(axis=1)
        self.counts = np.zeros_like(self.counts)
        half = merged.size // 2
        self.counts[HALF_BINS - half : HALF_BINS + half] = merged
        self.exponent = exponent


def union(histograms: Iterable[Histogram]) -> Histogram:
    """The histogram of the values of all histograms, for tensors that must share one scale."""
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
    # frexp gives amax < 2**e; 2**e must be at most HALF_BINS widths.
    return max(math.frexp(amax)[1] - (HALF_BINS.bit_length() - 1), _MIN_EXPONENT)
