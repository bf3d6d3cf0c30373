"""Values that no training made: tables of bins, coordinates, averages, blur and edge kernels, cosines.

They are told by their values alone: each rule asks for a relation that holds to rounding in every line of the array, which
trained values never fulfil.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SAMPLE = 8
"""Rows that are looked at first: most weights are told by these."""

_Floats = npt.NDArray[np.float64]
# Values on a line before their regularity is evidence.
_MIN_LINE = 4
# Of integers: the sequence is as long as chance cannot make it, despite rounding.
_MIN_INTEGER_LINE = 8
# Roundings of the stored type that a computed table may be off by.
_ROUNDINGS = 8


def is_table(lines: _Floats, rounding: float, *, is_convolution: bool) -> bool | None:
    """Whether a weight's values are a table; None if they are all equal, which says nothing.

    Args:
        lines: (K, ..., C): the axis that is summed over comes last; of a convolution (K, R, S, C).
        rounding: Relative rounding of the type that they are stored in.
        is_convolution: Its kernel may be the table.
    """
    if not np.isfinite(lines).all():
        return False
    # Equal outputs of equal inputs compute nothing worth keeping: an initial value, not a table.
    if not lines.any() or np.ptp(lines) == 0:
        return None
    tolerance = _ROUNDINGS * rounding
    if _are_sequences(lines.reshape(-1, lines.shape[-1]), tolerance):
        return True
    return is_convolution and lines.ndim > 2 and _is_one_kernel(lines, tolerance)


def is_fixed_weight(weight: npt.NDArray[np.floating], *, is_convolution: bool) -> bool:
    """Whether a weight (K, C, ...) is a table."""
    rounding = float(np.finfo(weight.dtype).eps)

    def judged(part: npt.NDArray[np.floating]) -> bool | None:
        return is_table(np.moveaxis(part, 1, -1).astype(np.float64), rounding, is_convolution=is_convolution)

    if len(weight) > SAMPLE and judged(weight[:SAMPLE]) is False:
        return False
    return bool(judged(weight))


def _are_sequences(lines: _Floats, tolerance: float) -> bool:
    """Whether every line that is not zero is regular: constant, arithmetic, geometric, or samples of a wave.

    All of these fulfil x[n - 1] + x[n + 1] = c x[n] with one c for the line, also if each value is repeated, or the whole
    sequence is: the rows and columns of a grid of coordinates.
    """
    lines = lines[np.abs(lines).max(axis=1) > 0]
    return all(_is_sequence(line, tolerance) for line in lines)


def _is_sequence(line: _Floats, tolerance: float) -> bool:
    bound = tolerance * float(np.abs(line).max())
    if _is_recurrence(line, bound):
        return True
    length = len(line)
    for part in (d for d in range(2, length // 2 + 1) if length % d == 0):
        blocks = line.reshape(part, -1)
        if len(blocks[0]) >= _MIN_LINE and np.ptp(blocks, axis=0).max() <= bound and _is_recurrence(blocks[0], bound):
            return True
        if part >= _MIN_LINE and np.ptp(blocks, axis=1).max() <= bound and _is_recurrence(blocks[:, 0], bound):
            return True
    return False


def _is_recurrence(line: _Floats, bound: float) -> bool:
    if len(line) < _MIN_LINE:
        return False
    middle, sides = line[1:-1], line[:-2] + line[2:]
    if not middle.any():
        return False
    factor = float(middle @ sides / (middle @ middle))
    # Each of the three values is rounded.
    return bool(np.abs(sides - factor * middle).max() <= bound * (2 + abs(factor)))


def is_rounded_sequence(lines: _Floats) -> bool:
    """Whether every line of integers (K, C) that is not zero is arithmetic or constant, to rounding."""
    lines = lines[np.abs(lines).max(axis=1) > 0]
    length = lines.shape[1]
    if length < _MIN_INTEGER_LINE:
        return False
    at = np.arange(length) - (length - 1) / 2
    centered = lines - lines.mean(axis=1, keepdims=True)
    slopes = centered @ at / (at @ at)
    return bool(np.abs(centered - slopes[:, None] * at).max() <= 1)


def _is_one_kernel(lines: _Floats, tolerance: float) -> bool:
    """Whether all channels have one spatial kernel but for a factor, and the kernel is symmetric: a blur or an edge filter.

    Args:
        lines: (K, R, S, C) or with another number of spatial axes.
        tolerance: Relative to the largest value.
    """
    spatial = lines.shape[1:-1]
    kernels = np.moveaxis(lines, -1, 1).reshape(-1, int(np.prod(spatial)))
    kernels = kernels[np.abs(kernels).max(axis=1) > 0]
    if kernels.shape[1] < _MIN_LINE or len(kernels) < _MIN_LINE:
        return False
    first = kernels[np.argmax(np.abs(kernels).max(axis=1))]
    if np.count_nonzero(first) < 2:
        # A 1 x 1 convolution in a larger frame.
        return False
    factors = kernels @ first / (first @ first)
    bound = tolerance * float(np.abs(first).max())
    if np.abs(kernels - factors[:, None] * first).max() > 2 * bound:
        return False
    turned = first[::-1]
    return bool(np.abs(first - turned).max() <= 2 * bound or np.abs(first + turned).max() <= 2 * bound)
