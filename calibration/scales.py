"""Symmetric INT8 quantization with zero point 0, so that zeros stay zeros."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_INT8 = 127
"""The largest magnitude used; -128 is not, so that the range is symmetric."""

MIN_SCALE = float(np.finfo(np.float16).smallest_normal)
MAX_SCALE = float(np.finfo(np.float16).max)


def scale_of(amax: float) -> float:
    """The scale that maps `amax` to 127, as a float32 that FP16 can represent too.

    Never 0, infinite or subnormal, even when stored as FP16: ranges below 127 * 2**-14 get the smallest normal FP16 number,
    and the range 0 gets the scale 1.

    Args:
        amax: The largest magnitude to represent.

    Raises:
        ValueError: `amax` is negative, NaN, infinite, or above 127 * 65504.
    """
    if not (math.isfinite(amax) and amax >= 0):
        raise ValueError(f"{amax:g} is not a range")
    if amax == 0:
        return 1.0
    scale = float(np.float32(amax / MAX_INT8))
    if scale > MAX_SCALE:
        raise ValueError(f"{amax:.4g} exceeds the range of an FP16 scale, {MAX_INT8 * MAX_SCALE:.4g}")
    return max(scale, MIN_SCALE)


def quantize_weight(values: npt.NDArray[Any], axis: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Quantize a weight to integers in [-127, 127], with one scale per channel along `axis`.

    Rounds half to even in float32, as QuantizeLinear of ONNX does. Zeros stay 0.

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
    return np.clip(rounded, -MAX_INT8, MAX_INT8).astype(np.int8), scales
