"""Weights that are no trained parameters but tables: bins, coordinates, averages, blur and edge kernels, cosines.

Pruning one breaks what it computes, and no training made up for it. They are told by their values alone: each rule asks
for a relation that holds to rounding in every line of the weight, which trained values never fulfil.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from maskplan.exporters.tensors import Array, native_values, read_values
from maskplan.exporters.weights import WeightUse
from maskplan.pipeline.masking.eligibility import FEW_OUTPUTS, FIXED, MIN_OUTPUTS

# Rows that are looked at first.
_SAMPLE = 8

_Floats = npt.NDArray[np.float64]
# Values on a line before their regularity is evidence.
_MIN_LINE = 4
# Of integers: the sequence is as long as chance cannot make it, despite rounding.
_MIN_INTEGER_LINE = 8
# Roundings of the stored type that a computed table may be off by.
_ROUNDINGS = 8


def stays_dense(use: WeightUse, folder: Path | None) -> str | None:
    """Why an eligible weight must not be pruned: `fewer_than_4_outputs` or `fixed_table`; None if it may be.

    Args:
        use: With a tensor.
        folder: Of the ONNX file, for external data.

    Raises:
        TensorError: Its values cannot be read.
    """
    assert use.tensor is not None
    if use.op == "Conv" and use.outputs < MIN_OUTPUTS:
        return FEW_OUTPUTS
    return FIXED if is_fixed(use, folder) else None


def is_fixed(use: WeightUse, folder: Path | None) -> bool:
    """Whether a weight's values are a table; see the module's text."""
    assert use.tensor is not None
    values = native_values(use.tensor, folder)
    integer = values.dtype.kind in "iu"
    # Most weights are told by their first lines, without a copy of all.
    if values.shape[0] > _SAMPLE and use.axis != 0 and _is_regular(values[:_SAMPLE], use, folder, integer) is False:
        return False
    return bool(_is_regular(values, use, folder, integer))


def _is_regular(values: Array, use: WeightUse, folder: Path | None, integer: bool) -> bool | None:
    """Whether the values are a table; None if they are all equal where that says nothing."""
    lines = np.moveaxis(values.astype(np.float64), use.axis, -1)
    if integer and use.zero_point is not None:
        zero = read_values(use.zero_point.tensor, folder).array
        if zero.size != 1:
            return False
        lines = lines - float(zero.reshape(()))
    if not np.isfinite(lines).all():
        return False
    if not lines.any():
        return None
    if np.ptp(lines) == 0:
        # Equal outputs of equal inputs compute nothing worth keeping: an initial value, not a table.
        return None
    if integer:
        return _is_rounded_sequence(lines.reshape(-1, lines.shape[-1]))
    rounding = float(np.finfo(values.dtype).eps) if values.dtype.kind == "f" else 2.0**-7
    tolerance = _ROUNDINGS * rounding
    if _are_sequences(lines.reshape(-1, lines.shape[-1]), tolerance):
        return True
    return use.op == "Conv" and lines.ndim > 2 and _is_one_kernel(lines, tolerance)


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


def _is_rounded_sequence(lines: _Floats) -> bool:
    """Whether every line of integers that is not zero is arithmetic or constant, to rounding."""
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
