"""`maskplan check`: whether the weights of an ONNX file are 2:4."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.exit_codes import GateError
from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import override, patterns, write_report
from maskplan.pipeline.core.choices import VIOLATING

if TYPE_CHECKING:
    from maskplan.pipeline.core.reports import ConformanceReport

_EXAMPLES = """
maskplan check sparse.onnx
maskplan check sparse.onnx --strict --allow-dense 'fc.*' --junit check.xml
maskplan check other.onnx --masks masks.safetensors --report check.json
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    add_command(app, check, _EXAMPLES, conformance_defaults)


def conformance_defaults() -> dict[str, object]:
    """Defaults of the check, which `prune` shares."""
    from maskplan.exporters.conformance import CheckOptions

    return vars(CheckOptions())


def check(
    model: options.OnnxFile,
    masks: Annotated[
        Path | None,
        typer.Option(help="Mask file that lists the weights that must conform; by default the ONNX file's own list."),
    ] = None,
    strict: Annotated[bool | None, typer.Option(help="Every eligible weight must conform.")] = None,
    allow_dense: Annotated[
        list[str] | None, typer.Option(help="Pattern of names of weights or nodes that may stay dense. Repeatable.")
    ] = None,
    pattern: options.Pattern = None,
    report: options.Report = None,
    junit: Annotated[Path | None, typer.Option(help="Write a JUnit XML file with one test case per weight.")] = None,
) -> None:
    """Check that the weights of an ONNX file are 2:4 along their reduction axis. Exit code 1 if they are not."""
    from maskplan.exporters.conformance import CheckOptions, check_2to4
    from maskplan.pipeline.core.files import write_atomically
    from maskplan.pipeline.core.junit import conformance_junit
    from maskplan.pipeline.core.serialization import encode
    from maskplan.pipeline.masking.maskset import load_masks

    masked = tuple(load_masks(masks)) if masks is not None else None
    check_options = override(
        CheckOptions(masked=masked), strict=strict, pattern=pattern, allow_dense=patterns(allow_dense)
    )
    conformance = check_2to4(model, check_options)
    write_report(report, encode(conformance))
    if junit is not None:
        write_atomically(junit, conformance_junit(conformance, str(model)), option="--junit")
    _show(conformance)
    if not conformance.passed:
        raise GateError(f"{model}: {conformance.reason}")


def _show(report: ConformanceReport) -> None:
    from rich.table import Table

    from maskplan.pipeline.core.console import stdout_console
    from maskplan.pipeline.core.escaping import one_line

    table = Table()
    for title in ("weight", "op", "shape", "verdict", "reason"):
        table.add_column(title)
    for weight in report.weights:
        reason = (weight.reason or "").replace("_", " ")
        if weight.first_violation is not None and weight.verdict == VIOLATING:
            index = ", ".join(map(str, weight.first_violation.index))
            reason = f"{weight.violating_groups} of {weight.groups} groups, first at [{index}]"
        if weight.hint is not None:
            reason = f"{reason}; {weight.hint}" if reason else weight.hint
        shape = " x ".join(map(str, weight.shape))
        table.add_row(*map(one_line, (weight.name, weight.op, shape, weight.verdict.replace("_", " "), reason)))
    console = stdout_console()
    console.print(table)
    console.print(
        f"{report.verdict}: {report.conforming} conforming, {report.violating} violating, {report.dense_by_choice} dense by"
        f" choice, {report.ineligible} ineligible" + (f", {report.unknown} unknown" if report.unknown else ""),
        soft_wrap=True,
    )
