"""Scales and integers: symmetric INT8 with the zero point at 0, so that zeros stay zeros."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

LARGEST_INTEGER = 127
"""Of either sign; -128 is left out, so that a weight and its negative are equally far from 0."""

SMALLEST_SCALE = float(np.finfo(np.float16).smallest_normal)
LARGEST_SCALE = float(np.finfo(np.float16).max)


def scale_of(amax: float) -> float:
    """The scale at which `amax` becomes 127, as a float32 that FP16 holds too.

    Never 0, infinite or subnormal, even when stored as FP16: ranges below 127 * 2**-14 get the smallest normal FP16 number,
    and a range of nothing but zeros gets 1.

    Args:
        amax: The largest magnitude to represent.

    Raises:
        ValueError: `amax` is negative, NaN or infinite, or beyond 127 * 65504.
    """
    if not (math.isfinite(amax) and amax >= 0):
        raise ValueError(f"{amax:g} is not a range")
    if amax == 0:
        return 1.0
    scale = float(np.float32(amax / LARGEST_INTEGER))
    if scale > LARGEST_SCALE:
        raise ValueError(f"{amax:.4g} is beyond the range of an FP16 scale, {LARGEST_INTEGER * LARGEST_SCALE:.4g}")
    return max(scale, SMALLEST_SCALE)


def quantize_weight(values: npt.NDArray[Any], axis: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """A weight as integers of [-127, 127], with a scale for each channel along `axis`.

    Rounds half to even in float32, as ONNX's QuantizeLinear does. What is 0 becomes 0.

    Args:
        values: Float32, of any shape.
        axis: Of the output channels.

    Returns:
        Integers of the same shape, and scales (channels,).

    Raises:
        ValueError: A value is NaN or infinite, or too large for an FP16 scale.
    """
    values = np.asarray(values, np.float32)
    axis %= values.ndim
    others = tuple(i for i in range(values.ndim) if i != axis)
    amax = np.abs(values).max(axis=others, initial=0)
    scales = np.array([scale_of(float(a)) for a in amax], np.float32)
    rounded = np.rint(values / np.expand_dims(scales, others))
    return np.clip(rounded, -LARGEST_INTEGER, LARGEST_INTEGER).astype(np.int8), scales
