"""`maskplan inspect`: what an engine is, and which of its layers run sparse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import write_report
from maskplan.pipeline.core.terminal import print_line

if TYPE_CHECKING:
    from maskplan.pipeline.core.artifacts import EngineFile, Provenance

_EXAMPLES = """
maskplan inspect build/r50/engine.onnx
maskplan inspect build/r50/engine.plan --report engine.json
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    add_command(app, inspect, _EXAMPLES)


def inspect(
    engine: Annotated[Path, typer.Argument(help="An engine with its sidecar file.", show_default=False)],
    report: options.Report = None,
) -> None:
    """Show what an engine is, which weights it holds, and which of its layers run sparse."""
    from maskplan.engines.build import why_not_runnable
    from maskplan.engines.sidecar import read_engine
    from maskplan.pipeline.core.serialization import encode

    record = read_engine(engine)
    write_report(report, encode(record, record.path.parent))
    provenance = record.provenance
    lines = {
        "engine": f"{record.path.name}, {record.bytes:,} bytes, sha256 {record.sha256}",
        "backend": f"{record.backend} {record.runtime_version} on {record.device}",
        "precision": f"{record.precision}, {record.typing} typing",
        "flags": ", ".join(_flags(record)) or "none",
        "profiles": ", ".join(map(str, record.profiles)),
        "inputs": ", ".join(f"{t.name} {t.dtype} {_shape(t.shape)}" for t in record.inputs),
        "outputs": ", ".join(f"{t.name} {t.dtype} {_shape(t.shape)}" for t in record.outputs),
        "from": f"ONNX sha256 {record.onnx_sha256}",
        "model": _model(provenance) if provenance else "unknown: file of another tool",
        "masks": _masks(provenance) if provenance and provenance.masked else "unknown",
        "sparse": _evidence(record),
    }
    reason = why_not_runnable(record)
    if reason is not None:
        lines["runs here"] = f"no: {reason}"
    for label, text in [*lines.items(), *(("note", note) for note in record.notes)]:
        print_line(f"{label:<10} {text}")
    for layer in record.layers:
        sizes = f"C {layer.c or '?'} K {layer.k or '?'}"
        reason = f" ({layer.reason})" if layer.reason else ""
        print_line(f"  {layer.state:<8} {sizes:<16} {layer.name}: {layer.kernel or 'kernel unknown'}{reason}")


def _model(provenance: Provenance) -> str:
    permuted = ", permuted" if provenance.permutation else ""
    untrained = "" if provenance.trained else " (untrained)"
    return f"{provenance.model}, weights {provenance.origin}{permuted}{untrained}"


def _masks(provenance: Provenance) -> str:
    return f"{provenance.pattern} {provenance.method} on {len(provenance.masked)} weights"


def _flags(record: EngineFile) -> list[str]:
    flags = {
        "sparse weights": record.sparse_weights,
        "version compatible": record.version_compatible,
        "hardware compatible": record.hardware_compatible,
        "refittable": record.refittable,
        "stripped of weights": record.strip_plan,
    }
    targets = [f"targets {', '.join(record.targets)}"] if record.targets else []
    return [name for name, is_set in flags.items() if is_set] + targets


def _evidence(record: EngineFile) -> str:
    from maskplan.engines.evidence import totals
    from maskplan.pipeline.core.choices import ONNXRUNTIME, TENSORRT_RTX

    if record.layers:
        counts = totals(record.layers)
        return f"{counts.sparse} layers sparse, {counts.dense} dense, {counts.unknown} unknown"
    if record.backend == ONNXRUNTIME:
        return "no evidence of layers: the backend gives none"
    if record.backend == TENSORRT_RTX:
        return "no evidence of layers: the kernels are chosen on the GPU that loads the plan"
    reason = "the plan could not be inspected" if record.sparse_weights else "the sparse flag was off"
    return f"no evidence of layers: {reason}"


def _shape(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("batch" if d is None and i == 0 else str(d) for i, d in enumerate(shape)) + ")"
