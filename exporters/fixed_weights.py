"""Weights that are no trained parameters but tables: bins, coordinates, averages, blur and edge kernels, cosines.

Pruning one breaks what it computes, and no training made up for it. They are told by their values alone, by the rules of
`core/regular_values.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from maskplan.exporters.tensors import Array, native_values, read_values
from maskplan.exporters.weights import WeightUse
from maskplan.pipeline.core.regular_values import SAMPLE, is_rounded_sequence, is_table
from maskplan.pipeline.masking.eligibility import FEW_OUTPUTS, FIXED, MIN_OUTPUTS


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
    if values.shape[0] > SAMPLE and use.axis != 0 and _is_regular(values[:SAMPLE], use, folder, integer) is False:
        return False
    return bool(_is_regular(values, use, folder, integer))


def _is_regular(values: Array, use: WeightUse, folder: Path | None, integer: bool) -> bool | None:
    """Whether the values are a table; None if they are all equal where that says nothing."""
    lines = np.moveaxis(values.astype(np.float64), use.axis, -1)
    if not integer:
        rounding = float(np.finfo(values.dtype).eps) if values.dtype.kind == "f" else 2.0**-7
        return is_table(lines, rounding, is_convolution=use.op == "Conv")
    if use.zero_point is not None:
        zero = read_values(use.zero_point.tensor, folder).array
        if zero.size != 1:
            return False
        lines = lines - float(zero.reshape(()))
    if not lines.any() or np.ptp(lines) == 0:
        return None
    return is_rounded_sequence(lines.reshape(-1, lines.shape[-1]))
