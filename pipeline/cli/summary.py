"""The summary that `maskplan engine` prints at its end: a table, verdicts, files, and the next command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from maskplan.pipeline.cli.compile_summary import verdict_line
from maskplan.pipeline.core.choices import FAIL, TENSORRT_RTX
from maskplan.pipeline.core.console import stdout_console
from maskplan.pipeline.core.escaping import one_line, shell_command
from maskplan.pipeline.data.synthetic import synthetic_count
from maskplan.pipeline.stages.onnx_files import row_name

if TYPE_CHECKING:
    from maskplan.pipeline.core.reports import MethodRow
    from maskplan.pipeline.report.record import RunReport
    from maskplan.pipeline.run import LineResult

_MIN_WIDTH = 120
"""Columns where stdout is not a terminal: names are not cut."""


def show_summary(result: LineResult) -> None:
    """Print the table, what was written, and the next command."""
    console = stdout_console()
    if not console.is_terminal:
        console.width = max(console.width, _MIN_WIDTH)
    console.print(_table(result.report))
    for label, text in (*_verdicts(result.report), *_files(result)):
        console.print(f"{label:<12} {one_line(text)}", soft_wrap=True)


def _table(report: RunReport) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        title_style="bold",
        title=_title(report),
        title_justify="left",
    )
    table.add_column("weights", no_wrap=True)
    accuracies = () if report.parity.by_output else ("top-1 %", "top-5 %", "drop")
    for title in (*accuracies, "MB", *(f"ms at {b.batch}" for b in report.timing.batches)):
        table.add_column(title, justify="right")
    for row in _rows(report):
        table.add_row(*row)
    return table


def _title(report: RunReport) -> str:
    title = f"{report.model.model}, {report.precision} on {report.engine.backend}"
    if report.stand_in is None:
        return title
    return f"{title}, measured on {report.stand_in}"


def _rows(report: RunReport) -> Iterator[tuple[str, ...]]:
    """Cells of each row: name, accuracies, size, and times where the row is one of the two timed engines."""
    methods: dict[str, MethodRow | None] = {row.name: row for row in report.parity.methods}
    methods = methods or {"dense": None, row_name(report.model): None}
    by_output = bool(report.parity.by_output)
    # With INT8 the first row is the float model that the gate compares with; the timed dense engine is INT8.
    timed_dense = "dense" if report.calibration is None or len(methods) == 2 else "dense, INT8"
    engines = {timed_dense: ("dense", report.dense_engine), list(methods)[-1]: ("sparse", report.engine)}
    for name, row in methods.items():
        accuracy: tuple[str, ...] = () if by_output else ("", "", "")
        if row is not None:
            accuracy = (f"{row.top1:.2f}", f"{row.top5:.2f}", f"{row.drop:+.2f}")
        if name not in engines:
            yield name, *accuracy, ""
            continue
        kind, engine = engines[name]
        times = (f"{getattr(b, kind).p50_ms:.3g}" for b in report.timing.batches)
        yield name, *accuracy, f"{engine.bytes / 1e6:.2f}", *times


def _verdicts(report: RunReport) -> Iterator[tuple[str, str]]:
    """Label and text of each line about the run."""
    conformance, parity = report.conformance, report.parity
    conforming = f"{conformance.conforming} of {conformance.eligible} eligible weights are {conformance.pattern}"
    yield "conformance", f"{conformance.verdict}: {conforming}"
    if parity.by_output:
        details = parity.reason or "; ".join(c.message for c in parity.checks if c.passed)
    else:
        details = parity.reason or f"{parity.images} images, {parity.agreement:.2f}% agreement"
    yield "parity", f"{parity.verdict.replace('_', ' ')}: {details}"
    for output in parity.by_output:
        sqnr = "equal" if output.relative_error == 0 else f"SQNR {output.sqnr_db or float('nan'):.2f} dB"
        same = "" if output.agreement is None else f", same class in {output.agreement:.2f}% of its places"
        others = ", ".join(
            f"{row.name} {o.sqnr_db:.2f} dB"
            for row in parity.method_outputs[:-1]
            for o in row.outputs
            if o.name == output.name and o.sqnr_db is not None
        )
        yield "output", f"{output.name}: {sqnr}{same}{f' ({others})' if others else ''}"
    if parity.metric is not None:
        metric = parity.metric
        yield "metric", f"{metric.name}: {metric.dense:.5g} dense, {metric.sparse:.5g} sparse"
    if report.calibration is not None:
        calibration = report.calibration
        floats = f", {len(calibration.in_float)} in floating point" if calibration.in_float else ""
        yield (
            "calibration",
            f"{calibration.method} on {calibration.images} images: {calibration.quantized_layers} layers in INT8{floats}",
        )
    if synthetic := synthetic_count(report.model.image_sets):
        chosen = {
            "masks": synthetic_count(report.masks.image_sets),
            "statistics": report.model.recalibrated_images,
            "ranges": report.calibration is not None,
        }
        uses = ", ".join(name for name, is_chosen in chosen.items() if is_chosen)
        yield "images", f"{synthetic} synthetic images, made from the dense network, used for: {uses}"
    if report.permutation is not None:
        gain = 100 * (report.permutation.kept_after / report.permutation.kept_before - 1)
        yield "permutation", f"kept magnitude {gain:+.2f}%, efficacy {report.permutation.efficacy:.1f}"
    elif report.permutation_reason is not None:
        yield "permutation", f"none: {report.permutation_reason}"
    if report.compile is not None:
        yield "compiler", verdict_line(report.compile)
    elif report.compile_reason is not None:
        yield "compiler", f"not asked: {report.compile_reason}"
    for note in report.engine.notes if report.engine.sparse_flag is not None else ():
        yield "sparsity", note
    if report.timing.note:
        yield "timing", report.timing.note
    if report.refine is not None:
        outcome = f"{report.refine.kept} engine kept" if report.refine.refined else "skipped"
        yield "refine", f"{outcome}: {report.refine.reason}"
    if not report.model.trained:
        yield "UNTRAINED", "the weights are random: use this engine for timing only"


def _files(result: LineResult) -> Iterator[tuple[str, str]]:
    """Label and text of each line about what was written, and of the next command."""
    report, engine = result.report, shorten(result.report.engine.path)
    yield "engine", str(engine)
    if report.compile is not None and report.compile.sparse.path is not None:
        yield "RTX engine", str(shorten(report.compile.sparse.path))
    yield "report", str(shorten(result.files.html.path))
    if result.deployment is not None:
        yield "deployed", f"{result.deployment.folder}, version {result.deployment.version}"
    elif report.model.trained and report.parity.verdict != FAIL and report.engine.backend != TENSORRT_RTX:
        yield "next", shell_command(["maskplan", "deploy", engine, "--repository", "models"])
    else:
        yield "next", shell_command(["maskplan", "inspect", engine])


def shorten(path: Path) -> Path:
    """The path relative to the current folder, if it is below it."""
    current = Path.cwd()
    return path.relative_to(current) if path.is_relative_to(current) else path
