"""Raise the opset of an ONNX file with ONNX's own converter, and check that it still computes the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import version_converter

from maskplan.exporters.metadata import opset_of
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.ort_session import open_session

log = logging.getLogger(__name__)

# Of the largest value of an output: newer versions of an operator may round in another order.
_TOLERANCE = 1e-4


def raise_opset(model: onnx.ModelProto, opset: int, where: object) -> onnx.ModelProto:
    """The model with a newer opset; its names, weights and metadata stay.

    Raises:
        InputError: ONNX's converter does not convert it.
    """
    before = opset_of(model)
    try:
        raised = version_converter.convert_version(model, opset)
    except Exception as error:  # the converter has no exceptions of its own
        raise InputError(
            "the model's opset is too old, and ONNX's converter cannot raise it",
            where=where,
            found=f"opset {before}: {str(error).partition('Assertion')[2].strip() or error}",
            fix=f"export it again with opset {opset} or later",
        ) from error
    log.info("%s: opset %d, which is too old, is raised to %d", where, before, opset)
    return raised


def require_same_outputs(
    first: onnx.ModelProto, second: onnx.ModelProto, feeds: Mapping[str, npt.NDArray[Any]], where: object
) -> None:
    """Raise unless two models compute the same on one set of feeds.

    Raises:
        InputError: They do not.
    """
    outputs = [open_session(m.SerializeToString(), where).run(None, dict(feeds)) for m in (first, second)]
    names = [value.name for value in first.graph.output]
    different = [name for name, a, b in zip(names, *outputs, strict=True) if not _is_same(a, b)]
    if different:
        fix = f"export it again with opset {opset_of(second)} or later"
        raise InputError(
            "ONNX's converter changes what the model computes", where=where, found=", ".join(different), fix=fix
        )


def _is_same(first: Any, second: Any) -> bool:
    a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.kind != "f":
        return bool(np.array_equal(a, b))
    largest = float(np.abs(a[np.isfinite(a)]).max(initial=0.0))
    return bool(np.allclose(a, b, rtol=0, atol=_TOLERANCE * largest, equal_nan=True))
