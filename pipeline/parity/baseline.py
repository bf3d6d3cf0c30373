"""Compare the gate's numbers with those of an earlier report: what has changed since the last release."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import read_bytes
from maskplan.pipeline.core.reports import DriftRow, ParityReport
from maskplan.pipeline.core.serialization import parse_json

_NUMBERS = (
    "top1_dense",
    "top1_sparse",
    "top5_sparse",
    "top1_drop",
    "agreement",
    "flip_rate",
    "max_abs_diff",
    "cosine_min",
)


def read_baseline(path: Path) -> Mapping[str, Any]:
    """Read an earlier report of `compare`, or the `parity` section of a report.json of `maskplan engine`.

    Raises:
        InputError: The file is missing or is neither.
    """
    try:
        values = parse_json(read_bytes(path))
    except ValueError as error:
        raise InputError(
            "the baseline is not JSON", where=path, found=error, fix="give a file that --report wrote"
        ) from error
    parity = values.get("parity", values) if isinstance(values, dict) else None
    if not isinstance(parity, dict) or not {"verdict", "top1_drop"} <= set(parity):
        raise InputError(
            "the baseline is not a report of `maskplan compare`",
            where=path,
            found=sorted(values)[:8] if isinstance(values, dict) else type(values).__name__,
            fix="give a file that `maskplan compare --report` or `maskplan engine` wrote",
        )
    return parity


def with_drift(report: ParityReport, baseline: Mapping[str, Any]) -> ParityReport:
    """Add a row for each number with its change since the baseline; None if either report lacks the number."""
    rows = []
    earlier = {o["name"]: o for o in baseline.get("by_output") or () if isinstance(o, dict) and "name" in o}
    numbers = [(name, baseline.get(name), getattr(report, name)) for name in _NUMBERS]
    for output in report.by_output:
        numbers.append((f"{output.name} sqnr_db", earlier.get(output.name, {}).get("sqnr_db"), output.sqnr_db))
    for name, then_value, now_value in numbers:
        before, now = _number(then_value), _number(now_value)
        change = now - before if now is not None and before is not None else None
        rows.append(DriftRow(name, before, now, change))
    notes = report.notes
    then, digest = baseline.get("images"), baseline.get("images_sha256")
    if then != report.images:
        notes = (*notes, f"the baseline was measured on {then} labeled images, this report on {report.images}")
    elif digest is not None and report.images_sha256 is not None and digest != report.images_sha256:
        notes = (*notes, "the baseline was measured on different images")
    return replace(report, drift=tuple(rows), notes=notes)


def _number(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
