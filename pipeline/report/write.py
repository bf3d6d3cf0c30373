"""The report stage: what a run found, as report.json for machines and report.html for people."""

from __future__ import annotations

import contextlib
import platform
import shlex
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from maskplan.engines.evidence import totals
from maskplan.pipeline import __version__
from maskplan.pipeline.core.artifacts import EngineFile, MaskSet
from maskplan.pipeline.core.files import write_atomically, write_json
from maskplan.pipeline.core.reports import Fidelity
from maskplan.pipeline.core.serialization import encode
from maskplan.pipeline.permutation.record import Permuted
from maskplan.pipeline.report.record import ReportFile, ReportFiles, RunReport

SCHEMA = 2
"""Version of the keys of report.json; raised when a key is renamed, removed or changes its meaning."""


def write_report(report: RunReport, json_path: Path, html_path: Path) -> ReportFiles:
    """Write both forms."""
    from maskplan.pipeline.report.html import render

    values = report_values(report)
    return ReportFiles(
        ReportFile(json_path, write_json(json_path, values)),
        ReportFile(html_path, write_atomically(html_path, render(report, values).encode())),
    )


def report_values(report: RunReport) -> dict[str, Any]:
    """The report as JSON values. Accuracies and agreement in percent, drops in points, times in ms."""
    root = report.engine.path.parent
    model = encode(report.model)
    # Only the check for overlaps needs the images' digests.
    for images in model["image_sets"]:
        del images["sketch"], images["members"]
    return {
        "schema": SCHEMA,
        "model": {**model, "seed": report.seed, "precision": report.precision},
        "permutation": permutation_values(report.permutation, report.permutation_reason, root),
        "masks": masks_values(report.masks, root),
        "mask_statistics": encode(report.mask_statistics),
        "conformance": encode(report.conformance),
        "calibration": encode(report.calibration),
        "engine": engine_values(report, report.engine, root, report.fidelity),
        "dense_engine": engine_values(report, report.dense_engine, root, None),
        "compile": compile_values(report, root),
        "parity": encode(report.parity),
        "depth": encode(report.depth),
        "timing": encode(report.timing),
        "refine": encode(report.refine),
        "recipe": encode(report.recipe),
        "command": report.command,
        "versions": versions(),
    }


def permutation_values(done: Permuted | None, reason: str | None, root: Path) -> dict[str, Any] | None:
    """The permutation's part of the report, or why there is none; None where none was asked for."""
    if done is None:
        return None if reason is None else {"reason": reason}
    path = done.permutation.path
    values: dict[str, Any] = encode(done.permutation)
    return {
        **values,
        "path": path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name,
        "kept_before": done.kept_before,
        "kept_after": done.kept_after,
        "kept_bound": done.kept_bound,
        "efficacy": done.efficacy,
        "reason": None,
    }


def compile_values(report: RunReport, root: Path) -> dict[str, Any] | None:
    """What the compiler made of the ONNX files, or why it was not asked; None where that was turned off."""
    if report.compile is None:
        return None if report.compile_reason is None else {"reason": report.compile_reason}
    return {**encode(report.compile, root), "reason": None}


def masks_values(masks: MaskSet, root: Path) -> dict[str, Any]:
    """The masks' part of the report, with totals."""
    masked = sum(m.macs for m in masks.masked)
    total = masked + sum(d.macs for d in masks.dense)
    parameters = sum(_size(m.shape) for m in masks.masked)
    values: dict[str, Any] = encode(masks, root)
    for images in values["image_sets"]:
        del images["sketch"], images["members"]
    return {
        **values,
        "pattern": str(masks.pattern),
        "masked_layers": len(masks.masked),
        "masked_parameters": parameters,
        "masked_macs_percent": 100 * masked / total if total else None,
        "kept_magnitude_percent": 100 * weighted_mean([(m.kept, _size(m.shape)) for m in masks.masked]),
    }


def engine_values(report: RunReport, engine: EngineFile, root: Path, fidelity: Fidelity | None) -> dict[str, Any]:
    """An engine's part of the report. Totals count a layer once; `layers` lists it once for each profile of the engine."""
    values: dict[str, Any] = encode(engine, root)
    layers = values.pop("layers")
    del values["provenance"]
    counted = totals(engine.layers)
    return {
        **values,
        "backend_reason": report.backend_reason,
        "ran_on": report.ran_on,
        "fidelity": encode(fidelity),
        "sparsity": {
            "requested": engine.sparse_weights,
            "sparse_layers": counted.sparse,
            "dense_layers": counted.dense,
            "unknown_layers": counted.unknown,
            "layers": layers,
        },
    }


def as_typed(arguments: Sequence[str]) -> str:
    """The command line as typed in a shell; absolute paths are cut to their last part, so that no host path is published."""
    return shlex.join(["maskplan", *(_without_host_path(argument) for argument in arguments)])


def _without_host_path(argument: str) -> str:
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    if value.startswith(("/", "~")):
        # A factory's name may follow the file's: DIR/net.py:build.
        value = value.rstrip("/").rpartition("/")[2] or value
    return f"{option}{equals}{value}"


def versions() -> dict[str, str]:
    """Versions of the packages used; none is imported to find them."""
    found = {"maskplan": __version__, "python": platform.python_version()}
    ours = ("numpy", "onnx", "onnxruntime", "polygraphy", "torch", "torchvision", "timm")
    for name in (*ours, "tensorrt", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def weighted_mean(pairs: list[tuple[float, int]]) -> float:
    """Mean of values with weights; 0 for none."""
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else 0.0


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
