"""The 2:4 check: whether the weights that should be N:M are, in the file that the engine is built from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from maskplan.exporters.computed_weights import folded, is_masked
from maskplan.exporters.counting import GroupCounts, count_groups
from maskplan.exporters.fixed_weights import stays_dense
from maskplan.exporters.folding import FoldError
from maskplan.exporters.lazy_load import load_lazily
from maskplan.exporters.metadata import read_provenance
from maskplan.exporters.name_patterns import matching, require_matches
from maskplan.exporters.tensors import Array, StoredValues, TensorError, dtype_name, is_numeric, read_values
from maskplan.exporters.unseen import UnseenUse, unseen_uses
from maskplan.exporters.weights import WeightUse, weight_uses
from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.choices import (
    CONFORMING,
    DENSE_BY_CHOICE,
    FAIL,
    INELIGIBLE,
    PASS,
    UNKNOWN,
    VIOLATING,
    CheckVerdict,
    WeightState,
)
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.reports import ConformanceReport, Violation, WeightVerdict
from maskplan.pipeline.core.weight_ops import LIKELY_SPEEDUP_CHANNELS
from maskplan.pipeline.masking.eligibility import DTYPE, UNSEEN, UNSUPPORTED
from maskplan.pipeline.masking.patterns import parse_pattern

UNBAKED = "the weight is multiplied by a mask in the graph: bake the mask into the weight, as `maskplan prune` does"


@dataclass(frozen=True)
class CheckOptions:
    """What must conform.

    Attributes:
        pattern: N:M.
        masked: Names of the weights that must conform; None takes them from the file's metadata.
        strict: Every eligible weight must conform, whether it is listed or not.
        allow_dense: Patterns (globs) of names of weights or nodes that may stay dense.
    """

    pattern: str = "2:4"
    masked: tuple[str, ...] | None = None
    strict: bool = False
    allow_dense: tuple[str, ...] = ()


class ConformanceError(Exception):
    """The 2:4 check of a file failed. A failed gate (exit code 1), not bad input: hence no `PipelineError`.

    Attributes:
        report: The verdict of every weight.
    """

    def __init__(self, report: ConformanceReport, file: str) -> None:
        self.report = report
        violating = (w for w in report.weights if w.verdict == VIOLATING)
        found = listed((f"{w.name} {w.shape}: {w.violating_groups} of {w.groups} groups" for w in violating), 3)
        lines = [f"{file} is not {report.pattern}: {report.reason}"]
        lines += [f"  found: {found}"] if found else []
        lines.append("  fix:   bake the masks after the last update of the weights, and export again")
        super().__init__("\n".join(lines))


def check_2to4(model: onnx.ModelProto | Path | str, options: CheckOptions | None = None) -> ConformanceReport:
    """Check every weight of Conv, Gemm and MatMul against N:M along its reduction axis.

    The weights that the file's metadata or `options.masked` lists must conform; the other eligible weights are dense by
    choice. With no list, or with `strict`, every eligible weight must conform. Zero is `== 0`: -0.0 is zero and NaN is not.
    In quantized weights the zero point is zero. A weight that is computed from stored tensors is checked as its operator
    reads it. Convolutions with fewer than 4 outputs and weights that are tables (`fixed_weights.py`) may stay dense unless
    they are listed. Weights that cannot be read, such as those of fused operators of ONNX Runtime, leave the verdict
    `unknown` if they would have to conform, and so does a file without weights.

    Args:
        model: An ONNX file, or a parsed model without external data.
        options: The pattern, and which weights.

    Raises:
        InputError: The file is not ONNX, weights in it cannot be read (the message counts them), or a pattern of
            `allow_dense` matches nothing.
    """
    options = options or CheckOptions()
    pattern = parse_pattern(options.pattern)
    path = None if isinstance(model, onnx.ModelProto) else Path(model)
    proto = model if isinstance(model, onnx.ModelProto) else load_lazily(Path(model))
    masked = options.masked
    if masked is None:
        provenance = read_provenance(proto, path or "the model")
        masked = provenance.masked if provenance else ()
    required = None if options.strict or not masked else frozenset(masked)
    verdicts, unreadable = [], []
    folder = path.parent if path else None
    for use in weight_uses(proto, pattern.m):
        try:
            verdicts.append(_check_use(use, pattern, required, options, folder))
        except TensorError as error:
            unreadable.append(f"{use.name}: {error}")
    verdicts += [_unseen(unseen, required, options) for unseen in unseen_uses(proto)]
    if unreadable:
        raise InputError(
            "a weight cannot be read" if len(unreadable) == 1 else f"{len(unreadable)} weights cannot be read",
            where=path,
            found=listed(unreadable, 3),
            fix="the file may be truncated or damaged: export it again",
        )
    found = tuple(v for v in verdicts if v is not None)
    known = (name for v in found for name in (v.name, v.node))
    require_matches(options.allow_dense, (*known, *masked), "--allow-dense", path)
    counts = Counter(v.verdict for v in found)
    dense_nodes = {v.name for v in found if _may_be_dense((v.name, v.node), options)}
    listed_names = [n for n in masked if n not in dense_nodes and not _may_be_dense((n,), options)]
    return ConformanceReport(
        *_verdict(found, listed_names, counts),
        pattern=str(pattern),
        eligible=counts[CONFORMING] + counts[VIOLATING] + counts[DENSE_BY_CHOICE],
        conforming=counts[CONFORMING],
        violating=counts[VIOLATING],
        dense_by_choice=counts[DENSE_BY_CHOICE],
        ineligible=counts[INELIGIBLE],
        weights=found,
        unknown=counts[UNKNOWN],
    )


def conforming_nodes(model: Path) -> frozenset[str]:
    """Names of the nodes whose weights are 2:4, even if the file was pruned to another pattern."""
    report = check_2to4(model, CheckOptions(pattern="2:4"))
    return frozenset(weight.node for weight in report.weights if weight.verdict == CONFORMING)


def require_2to4(model: onnx.ModelProto | Path | str, options: CheckOptions | None = None) -> ConformanceReport:
    """Run `check_2to4` and raise unless it passes.

    Raises:
        ConformanceError: The check failed; its `report` has the details.
        InputError: As `check_2to4`.
    """
    report = check_2to4(model, options)
    if not report.passed:
        raise ConformanceError(report, "the model" if isinstance(model, onnx.ModelProto) else Path(model).name)
    return report


def _verdict(
    verdicts: Collection[WeightVerdict], masked: Collection[str], counts: Counter[WeightState]
) -> tuple[CheckVerdict, str | None]:
    if counts[VIOLATING]:
        return FAIL, f"{counts[VIOLATING]} weights have groups with too many non-zeros"
    usable = {v.name for v in verdicts if v.verdict == CONFORMING}
    missing = [name for name in masked if name not in usable]
    if missing:
        return FAIL, f"{len(missing)} masked weights are not among the file's eligible weights, first {missing[0]}"
    if counts[UNKNOWN]:
        first = next(v for v in verdicts if v.verdict == UNKNOWN)
        more = f" and {counts[UNKNOWN] - 1} more" if counts[UNKNOWN] > 1 else ""
        return UNKNOWN, f"weights that cannot be read: {first.op} {first.node}{more}"
    if not verdicts:
        return UNKNOWN, "no weight was found"
    if not counts[CONFORMING]:
        return FAIL, "no eligible weight conforms" if counts[DENSE_BY_CHOICE] else "no weight is eligible"
    return PASS, None


def _check_use(
    use: WeightUse,
    pattern: Pattern,
    required: Collection[str] | None,
    options: CheckOptions,
    folder: Path | None,
) -> WeightVerdict | None:
    """The verdict of one use; None if a computed operand is no matrix."""
    if use.expression is None:
        return _check_weight(use, None, pattern, required, options, folder)
    try:
        values = folded(use, folder, pattern.m)
        if values is not None and is_masked(use.expression, folder):
            # Not what was meant to be built, even if its zeros are in the right places.
            return _check_weight(
                replace(use, name=use.expression.stored[0]), UNBAKED, pattern, required, options, folder
            )
    except FoldError as error:
        return _unseen(
            UnseenUse(use.name, use.node, use.op, None, True, f"cannot be computed: {error}"), required, options
        )
    hint = f"computed in the graph by {use.expression.op}"
    return None if values is None else _check_weight(values, hint, pattern, required, options, folder)


def _unseen(use: UnseenUse, required: Collection[str] | None, options: CheckOptions) -> WeightVerdict:
    verdict: WeightState = UNKNOWN
    if not use.can_be_sparse:
        verdict = INELIGIBLE
    elif (required is not None and use.name not in required) or _may_be_dense((use.name, use.node), options):
        verdict = DENSE_BY_CHOICE
    return WeightVerdict(
        name=use.name,
        node=use.node,
        op=use.op,
        shape=tuple(use.tensor.dims) if use.tensor is not None else (),
        axis=None,
        dtype=dtype_name(use.tensor.data_type) if use.tensor is not None else "unknown",
        verdict=verdict,
        reason=UNSEEN if use.can_be_sparse else UNSUPPORTED,
        groups=0,
        violating_groups=0,
        negative_zeros=0,
        first_violation=None,
        likely_speedup=False,
        hint=use.hint or None,
    )


def _check_weight(
    use: WeightUse,
    hint: str | None,
    pattern: Pattern,
    required: Collection[str] | None,
    options: CheckOptions,
    folder: Path | None,
) -> WeightVerdict:
    tensor, reason, first = use.tensor, use.reason, None
    counts = GroupCounts(0, 0, 0, None)
    if reason is None and tensor is not None:
        if is_numeric(tensor):
            values = read_values(tensor, folder)
            zero = _zero_values(use, values, folder)
            counts = count_groups(values.array, use.axis, pattern.n, pattern.m, zero, values.negative_zero)
            if counts.first is not None:
                first = _violation(values, counts.first, use.axis, pattern.m)
                hint = hint or _other_layout(values, use, pattern, zero)
        else:
            reason = DTYPE
    verdict: WeightState
    must_conform = required is not None and use.name in required
    if reason is not None:
        verdict = INELIGIBLE
    elif (required is not None and not must_conform) or (
        counts.violating and _may_be_dense((use.name, use.node), options)
    ):
        verdict = DENSE_BY_CHOICE
    elif counts.violating and not must_conform and (reason := stays_dense(use, folder)) is not None:
        verdict, first, hint = DENSE_BY_CHOICE, None, None
    else:
        verdict = VIOLATING if counts.violating else CONFORMING
    shape = tuple(tensor.dims) if tensor is not None else ()
    eligible = verdict != INELIGIBLE
    return WeightVerdict(
        name=use.name,
        node=use.node,
        op=use.op,
        shape=shape,
        axis=use.axis if eligible else None,
        dtype=dtype_name(tensor.data_type) if tensor is not None else "unknown",
        verdict=verdict,
        reason=reason,
        groups=counts.groups,
        violating_groups=counts.violating,
        negative_zeros=counts.negative_zeros,
        first_violation=first,
        likely_speedup=eligible and min(shape[-2:] if use.op == "MatMul" else shape[:2]) >= LIKELY_SPEEDUP_CHANNELS,
        hint=hint,
    )


def _may_be_dense(names: Iterable[str], options: CheckOptions) -> bool:
    return matching(names, options.allow_dense) is not None


def _zero_values(use: WeightUse, values: StoredValues, folder: Path | None) -> Array | None:
    """The value that represents zero, in a shape that broadcasts against the weight's; None for plain zero."""
    if use.zero_point is None:
        return None
    shape = values.array.shape
    stored = read_values(use.zero_point.tensor, folder)
    zero = stored.array
    if stored.negative_zero is not None:
        # Zero points of float8 can only be zero, of either sign.
        zero = np.where(zero == stored.negative_zero, 0, zero)
    if not zero.any():
        return None
    if zero.size == 1:
        return zero.reshape(())
    axis = use.zero_point.axis % len(shape)
    if zero.ndim == 1 and zero.size == shape[axis]:
        return zero.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    # Blocked quantization: one zero point for each block along `axis`.
    if zero.ndim == len(shape) and shape[axis] % zero.shape[axis] == 0:
        repeated = np.repeat(zero, shape[axis] // zero.shape[axis], axis)
        if repeated.shape == shape:
            return repeated
    raise TensorError(f"zero points {zero.shape} do not fit the weight {shape}")


def _violation(values: StoredValues, index: tuple[int, ...], axis: int, m: int) -> Violation:
    slices = tuple(slice(i, i + m) if a == axis else slice(i, i + 1) for a, i in enumerate(index))
    return Violation(index, tuple(float(v) for v in values.to_floats(values.array[slices]).reshape(-1)))


def _other_layout(values: StoredValues, use: WeightUse, pattern: Pattern, zero: Array | None) -> str | None:
    """A hint if a violating weight is N:M in a layout that TensorRT does not accept; else None."""
    array = values.array
    if zero is not None and zero.ndim:
        return None

    def conforms(candidate: Array, axis: int) -> bool:
        if candidate.shape[axis] % pattern.m:
            return False
        n, m, negative_zero = pattern.n, pattern.m, values.negative_zero
        return not count_groups(candidate, axis, n, m, zero, negative_zero, until_violation=True).violating

    if use.op == "Conv" and array[0, 0].size > 1 and conforms(array.reshape(array.shape[0], -1), 1):
        return f"{pattern} along the flattened C*R*S axis, which TensorRT does not accept: compute the masks along C"
    if array.ndim in (2, 4) and use.axis in (0, 1) and conforms(array, 1 - use.axis):
        return f"{pattern} along the output axis; TensorRT needs it along the reduction axis"
    return None
