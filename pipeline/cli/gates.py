"""`check` and `prune`: the commands that say whether weights are 2:4, and make them so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options

if TYPE_CHECKING:
    from maskplan.pipeline.core.reports import ConformanceReport


class GateError(Exception):
    """A check or gate said no: exit code 1."""


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command(
        epilog="Examples:\n\n  maskplan check sparse.onnx\n\n"
        "  maskplan check other.onnx --masks masks.safetensors --report check.json"
    )(check)
    app.command(epilog="Example:\n\n  maskplan prune model.onnx -o sparse.onnx")(prune)


def check(
    model: Annotated[Path, typer.Argument(help="An ONNX file of any tool.", show_default=False)],
    masks: Annotated[
        Path | None, typer.Option(help="Mask file whose weights must conform; else the file's own list.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Every eligible weight must conform.")] = False,
    allow_dense: Annotated[
        list[str] | None, typer.Option(help="Pattern of weight names that may stay dense; repeatable.")
    ] = None,
    pattern: Annotated[str, typer.Option(help="N:M.")] = "2:4",
    report: options.Report = None,
    junit: Annotated[Path | None, typer.Option(help="Write a JUnit XML file, a test case for each weight.")] = None,
) -> None:
    """Say whether the weights of an ONNX file are 2:4 along their reduction axis. Exit code 1 if not."""
    from maskplan.exporters.conformance import CheckOptions, check_2to4
    from maskplan.pipeline.core.files import write_atomically, write_json
    from maskplan.pipeline.core.junit import conformance_junit
    from maskplan.pipeline.core.serialization import encode
    from maskplan.pipeline.masking.maskset import load_masks

    names = tuple(load_masks(masks)) if masks is not None else None
    verdict = check_2to4(model, CheckOptions(pattern, names, strict, tuple(allow_dense or ())))
    if report is not None:
        write_json(report, encode(verdict))
    if junit is not None:
        write_atomically(junit, conformance_junit(verdict, str(model)))
    _show_conformance(verdict)
    if not verdict.passed:
        raise GateError(f"{model}: {verdict.reason}")


def prune(
    model: Annotated[Path, typer.Argument(help="An ONNX file of any tool.", show_default=False)],
    out: options.Out = Path("sparse.onnx"),
    pattern: Annotated[str, typer.Option(help="N:M.")] = "2:4",
    allow_dense: Annotated[
        list[str] | None, typer.Option(help="Pattern of weight names to leave alone; repeatable.")
    ] = None,
    report: options.Report = None,
) -> None:
    """Make the weights of an ONNX file 2:4 by magnitude, in the file itself; then check it."""
    from maskplan.exporters.conformance import CheckOptions, check_2to4
    from maskplan.exporters.prune import prune_onnx
    from maskplan.pipeline.core.files import write_json
    from maskplan.pipeline.core.serialization import encode
    from maskplan.pipeline.masking.patterns import parse_pattern

    left = tuple(allow_dense or ())
    done = prune_onnx(model, out, parse_pattern(pattern), left)
    verdict = check_2to4(out, CheckOptions(pattern, strict=True, allow_dense=left))
    if report is not None:
        write_json(report, encode(verdict))
    print(
        f"{out}: {done.changed} of {done.weights} weights changed, {done.zeroed:,} elements set to zero; {verdict.verdict}"
    )
    if not verdict.passed:
        raise GateError(f"{out}: {verdict.reason}")


def _show_conformance(report: ConformanceReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for title in ("weight", "op", "shape", "verdict", "why"):
        table.add_column(title)
    for weight in report.weights:
        why = (weight.reason or "").replace("_", " ")
        if weight.first_violation is not None and weight.verdict == "violating":
            first = ", ".join(map(str, weight.first_violation.index))
            why = f"{weight.violating_groups} of {weight.groups} groups, first at [{first}]"
        if weight.hint is not None:
            why = f"{why}; {weight.hint}" if why else weight.hint
        table.add_row(weight.name, weight.op, " x ".join(map(str, weight.shape)), weight.verdict.replace("_", " "), why)
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(
        f"{report.verdict}: {report.conforming} conforming, {report.violating} violating, {report.dense_by_choice} dense by"
        f" choice, {report.ineligible} ineligible",
        soft_wrap=True,
    )
