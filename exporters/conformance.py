"""The 2:4 check: is every weight that should be N:M really so, in the file that the engine is built from?"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx
from onnx import external_data_helper, numpy_helper

from exporters.metadata import load_onnx, read_provenance
from exporters.weights import WeightUse, weight_uses
from pipeline.artifacts import Pattern
from pipeline.errors import InputError
from pipeline.masking.eligibility import DTYPE
from pipeline.masking.patterns import parse_pattern
from pipeline.reports import (
    CONFORMING,
    DENSE_BY_CHOICE,
    FAIL,
    INELIGIBLE,
    PASS,
    VIOLATING,
    ConformanceReport,
    Violation,
    WeightVerdict,
)

_WIN_CHANNELS = 256


@dataclass(frozen=True)
class CheckOptions:
    """What must conform.

    Attributes:
        pattern: N:M.
        masked: Names of the weights that must conform; None takes them from the file's metadata.
        strict: Every eligible weight must conform, whatever the list says.
        allow_dense: Patterns of names that may stay dense.
    """

    pattern: str = "2:4"
    masked: tuple[str, ...] | None = None
    strict: bool = False
    allow_dense: tuple[str, ...] = ()


def check_2to4(model: onnx.ModelProto | Path | str, options: CheckOptions | None = None) -> ConformanceReport:
    """Check every weight of Conv, Gemm and MatMul against N:M along its reduction axis.

    The masked weights, as the file's metadata or `options.masked` lists them, must conform; the other eligible weights are
    dense by choice. With no list, or with `strict`, every eligible weight must conform. Zero is `== 0`, so -0.0 is zero and
    NaN is not.

    Args:
        model: An ONNX file, or a parsed model.
        options: The pattern, and which weights.

    Raises:
        InputError: The file is not ONNX, or a tensor in it cannot be read.
    """
    options = options or CheckOptions()
    pattern = parse_pattern(options.pattern)
    path = Path("model") if isinstance(model, onnx.ModelProto) else Path(model)
    proto = model if isinstance(model, onnx.ModelProto) else load_onnx(path)
    masked = options.masked
    if masked is None:
        provenance = read_provenance(proto, path)
        masked = provenance.masked if provenance else ()
    demanded = None if options.strict or not masked else frozenset(masked)
    verdicts = tuple(_judge(use, pattern, demanded, options.allow_dense, path) for use in weight_uses(proto, pattern.m))
    counts = Counter(v.verdict for v in verdicts)
    return ConformanceReport(
        *_verdict(verdicts, masked, counts),
        pattern=str(pattern),
        eligible=counts[CONFORMING] + counts[VIOLATING] + counts[DENSE_BY_CHOICE],
        conforming=counts[CONFORMING],
        violating=counts[VIOLATING],
        dense_by_choice=counts[DENSE_BY_CHOICE],
        ineligible=counts[INELIGIBLE],
        weights=verdicts,
    )


def _verdict(
    verdicts: Collection[WeightVerdict], masked: Collection[str], counts: Counter[str]
) -> tuple[str, str | None]:
    if counts[VIOLATING]:
        return FAIL, f"{counts[VIOLATING]} weights have groups with too many non-zeros"
    usable = {v.name for v in verdicts if v.verdict == CONFORMING}
    lost = [name for name in masked if name not in usable]
    if lost:
        return FAIL, f"{len(lost)} masked weights are not among the file's eligible weights, first {lost[0]}"
    if not counts[CONFORMING]:
        return FAIL, "no eligible weight conforms" if counts[DENSE_BY_CHOICE] else "no weight is eligible"
    return PASS, None


def _judge(
    use: WeightUse,
    pattern: Pattern,
    demanded: Collection[str] | None,
    allow_dense: Collection[str],
    path: Path,
) -> WeightVerdict:
    shape = tuple(use.tensor.dims) if use.tensor is not None else ()
    dtype = onnx.TensorProto.DataType.Name(use.tensor.data_type).lower() if use.tensor is not None else "unknown"
    reason, groups, violating, negative_zeros, first = use.reason, 0, 0, 0, None
    if reason is None and use.tensor is not None:
        values = _values(use.tensor, path)
        nonzero = _nonzero(values, use.zero_point, path)
        if nonzero is None:
            reason = DTYPE
        else:
            grouped = _grouped(nonzero, use.axis, pattern.m)
            too_many = grouped.sum(axis=-1, dtype=np.uint8) > pattern.n
            groups, violating = too_many.size, int(np.count_nonzero(too_many))
            if violating:
                first = _first_violation(values, too_many, use.axis, pattern.m)
            if np.issubdtype(values.dtype, np.floating):
                negative_zeros = int(np.count_nonzero(np.signbit(values) & ~nonzero))
    if reason is not None:
        verdict = INELIGIBLE
    elif (demanded is not None and use.name not in demanded) or (
        violating and any(fnmatch.fnmatchcase(use.name, glob) for glob in allow_dense)
    ):
        verdict = DENSE_BY_CHOICE
    else:
        verdict = VIOLATING if violating else CONFORMING
    eligible = verdict != INELIGIBLE
    return WeightVerdict(
        name=use.name,
        node=use.node,
        op=use.op,
        shape=shape,
        axis=use.axis if eligible else None,
        dtype=dtype,
        verdict=verdict,
        reason=reason,
        groups=groups,
        violating_groups=violating,
        negative_zeros=negative_zeros,
        first_violation=first,
        likely_to_win=eligible
        and len(shape) >= 2
        and min(shape[-2:] if use.op == "MatMul" else shape[:2]) >= _WIN_CHANNELS,
    )


def _values(tensor: onnx.TensorProto, path: Path) -> npt.NDArray[np.generic]:
    try:
        if external_data_helper.uses_external_data(tensor):
            inline = onnx.TensorProto()
            inline.CopyFrom(tensor)
            # Refuses locations outside the model's folder.
            external_data_helper.load_external_data_for_tensor(inline, str(path.parent))
            tensor = inline
        return cast(npt.NDArray[np.generic], numpy_helper.to_array(tensor))
    except (ValueError, TypeError, OSError, onnx.checker.ValidationError, RuntimeError) as error:
        raise InputError(
            "a weight cannot be read",
            where=f"{path}, {tensor.name}",
            found=str(error).partition("\n")[0],
            fix="the file may be truncated: export it again",
        ) from error


def _nonzero(
    values: npt.NDArray[np.generic], zero_point: onnx.TensorProto | None, path: Path
) -> npt.NDArray[np.bool_] | None:
    """Which elements are not zero; None for a type that has no zero to compare with."""
    if values.dtype.kind in "OSU" or values.dtype == np.bool_:
        return None
    if zero_point is not None:
        zero = _values(zero_point, path)
        if zero.size != 1:
            # A zero point a channel is sound only when they are all the same.
            if (zero != zero.flat[0]).any():
                return None
            zero = zero.reshape(-1)[:1]
        return cast(npt.NDArray[np.bool_], values != zero.reshape(()))
    return cast(npt.NDArray[np.bool_], values != np.zeros((), values.dtype))


def _grouped(nonzero: npt.NDArray[np.bool_], axis: int, m: int) -> npt.NDArray[np.bool_]:
    moved = np.moveaxis(nonzero, axis, -1)
    return moved.reshape(*moved.shape[:-1], moved.shape[-1] // m, m)


def _first_violation(values: npt.NDArray[np.generic], too_many: npt.NDArray[np.bool_], axis: int, m: int) -> Violation:
    """The violating group that comes first in storage order, by the index of its first element."""
    # Rows of argwhere are indices with the group's number last; put it back where the axis lies in storage.
    where = np.argwhere(too_many)
    stored = np.concatenate([where[:, :axis], where[:, -1:] * m, where[:, axis:-1]], axis=1)
    first = stored[np.lexsort(stored.T[::-1])[0]]
    slices = tuple(slice(i, i + m) if a == axis else slice(i, i + 1) for a, i in enumerate(first))
    return Violation(tuple(int(i) for i in first), tuple(float(v) for v in values[slices].reshape(-1)))
