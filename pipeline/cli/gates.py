"""`check`, `prune` and `compare`: the commands that say yes or no."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli import options

if TYPE_CHECKING:
    from pipeline.reports import ConformanceReport, ParityReport


class GateError(Exception):
    """A check or gate said no: exit code 1."""


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command(
        epilog="Examples:\n\n  maskplan check sparse.onnx\n\n"
        "  maskplan check other.onnx --masks masks.safetensors --report check.json"
    )(check)
    app.command(epilog="Example:\n\n  maskplan prune model.onnx -o sparse.onnx")(prune)
    app.command(
        epilog="Examples:\n\n  maskplan compare build/r50/dense_engine.onnx build/r50/engine.onnx --data imagenet\n\n"
        "  maskplan compare dense.onnx sparse.onnx --min-agreement 99"
    )(compare)


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
    from exporters.conformance import CheckOptions, check_2to4
    from pipeline.files import write_atomically, write_json
    from pipeline.junit import conformance_junit
    from pipeline.masking.maskset import load_masks
    from pipeline.records import encode

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
    from exporters.conformance import CheckOptions, check_2to4
    from exporters.prune import prune_onnx
    from pipeline.files import write_json
    from pipeline.masking.patterns import parse_pattern
    from pipeline.records import encode

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


def compare(
    dense: Annotated[
        Path,
        typer.Argument(help="The reference: an engine, an ONNX file or a checkpoint.", show_default=False),
    ],
    sparse: Annotated[Path, typer.Argument(help="What shall replace it.", show_default=False)],
    data: options.Data = None,
    max_top1_drop: Annotated[float, typer.Option(help="Points of top-1 that may be lost.")] = 1.0,
    min_agreement: Annotated[float | None, typer.Option(help="Percent of images on which both must agree.")] = None,
    mean: Annotated[
        str | None, typer.Option(help="For a foreign ONNX file: mean a channel, such as 0.5,0.5,0.5.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="For a foreign ONNX file: deviation a channel.")] = None,
    report: options.Report = None,
) -> None:
    """Say whether SPARSE may replace DENSE. Exit code 1 if not, or if it cannot be told."""
    from pipeline.bundled.digits import load_digits
    from pipeline.compare import CompareOptions
    from pipeline.compare import compare as compare_stage
    from pipeline.data import identify, open_val, require_disjoint
    from pipeline.files import write_json
    from pipeline.models import BUNDLED
    from pipeline.records import encode
    from pipeline.sides import open_side, shared_preprocessing

    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(open_side(path)) for path in (dense, sparse)]
        known = next((s.provenance for s in reversed(sides) if s.provenance), None)
        val = None
        if data is not None:
            val = open_val(data, known.labels if known else (), sides[0].classes)
        elif known is not None and known.model == BUNDLED and sides[0].classes == 10:
            val = load_digits().val
        if val is not None:
            shaped = [s for side in sides if side.provenance for s in side.provenance.image_sets]
            require_disjoint(identify(val), shaped)
        verdict = compare_stage(
            sides[0].classifier,
            sides[1].classifier,
            shared_preprocessing(sides, mean, std),
            [s.provenance for s in sides],
            val,
            CompareOptions(max_top1_drop, min_agreement),
        )
    if report is not None:
        write_json(report, encode(verdict))
    _show_parity(verdict)
    if verdict.verdict != "pass":
        raise GateError(verdict.reason or "")


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


def _show_parity(report: ParityReport) -> None:
    if report.images:
        assert report.drop_ci95 is not None
        print(f"images         {report.images}")
        print(f"top-1 %        {report.top1_dense:.2f} dense, {report.top1_sparse:.2f} sparse")
        print(f"drop, points   {report.top1_drop:+.2f} ({report.drop_ci95[0]:.2f} to {report.drop_ci95[1]:.2f}, 95%)")
        print(f"agreement %    {report.agreement:.2f}")
    if report.max_abs_diff is not None:
        print(f"largest difference of outputs {report.max_abs_diff:.3g}, smallest cosine {report.cosine_min:.5f}")
    print(f"{report.verdict.replace('_', ' ')}{': ' + report.reason if report.reason else ''}")
