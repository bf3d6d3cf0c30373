"""`maskplan check`: whether the weights of an ONNX file are 2:4, and whether NVIDIA's compiler takes the file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.exit_codes import GateError
from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import override, parse_shapes, patterns, write_report
from maskplan.pipeline.core.choices import UNKNOWN, VIOLATING
from maskplan.pipeline.core.terminal import print_line

if TYPE_CHECKING:
    from maskplan.pipeline.core.compilation import CompileResult
    from maskplan.pipeline.core.reports import ConformanceReport

_EXAMPLES = """
maskplan check sparse.onnx
maskplan check sparse.onnx --strict --allow-dense 'fc.*' --junit check.xml
maskplan check other.onnx --masks masks.safetensors --report check.json
maskplan check sparse.fp16.onnx --compile --profile 1:16:64
maskplan check dense.onnx --compile --allow-dense '*' --shape images:1x3x640x640
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
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Also compile the file with NVIDIA's compiler TensorRT-RTX, which needs no GPU. Exit code 1 if it refuses "
            "the file; --allow-dense '*' leaves only its verdict.",
        ),
    ] = False,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MIN:OPT:MAX", help="With --compile: batch sizes of a dynamic batch; 1:8:8 by default. Repeatable."
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:1x3x224x224",
            help="With --compile: shape of an input of which more than the batch is dynamic. Repeatable.",
        ),
    ] = None,
) -> None:
    """Check that the weights of an ONNX file are 2:4 along their reduction axis. Exit code 1 if they are not."""
    from maskplan.exporters.conformance import CheckOptions, check_2to4
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.core.files import write_atomically
    from maskplan.pipeline.core.junit import conformance_junit
    from maskplan.pipeline.core.serialization import encode
    from maskplan.pipeline.masking.maskset import load_masks

    if not compile and (profile or shape):
        given = [name for name, value in (("--profile", profile), ("--shape", shape)) if value]
        raise InputError(f"{', '.join(given)} without --compile", fix="add --compile, or remove them")
    masked = tuple(load_masks(masks)) if masks is not None else None
    check_options = override(
        CheckOptions(masked=masked), strict=strict, pattern=pattern, allow_dense=patterns(allow_dense)
    )
    conformance = check_2to4(model, check_options)
    compiler_alone = compile and "*" in check_options.allow_dense and not (conformance.passed or conformance.violating)
    if compiler_alone:
        conformance = dataclasses.replace(conformance, verdict=UNKNOWN, reason="every weight may be dense")
    compiled = _compile(model, profile, shape) if compile else None
    write_report(report, encode(conformance) | ({} if compiled is None else {"compile": encode(compiled)}))
    if junit is not None:
        write_atomically(
            junit, conformance_junit(conformance, str(model), compiled, judged=not compiler_alone), option="--junit"
        )
    _show(conformance)
    failed = [f"{model}: {conformance.reason}"] if not (conformance.passed or compiler_alone) else []
    if compiled is not None:
        hint = "; --allow-dense '*' leaves only the compiler's verdict" if compiled.accepted else ""
        failed = [reason + hint for reason in failed] + _show_compiled(compiled)
    if failed:
        raise GateError("\n".join(failed))


def _compile(model: Path, profile: list[str] | None, shape: list[str] | None) -> CompileResult:
    from maskplan.engines.build import parse_profile
    from maskplan.engines.trt.compile import compile_onnx
    from maskplan.exporters.lazy_load import load_lazily
    from maskplan.exporters.metadata import describe_onnx

    profiles = tuple(dict.fromkeys(parse_profile(text) for text in profile or ()))
    described = describe_onnx(model, load_lazily(model))
    return compile_onnx(described, profiles, shapes=parse_shapes(shape)).result


def _show_compiled(result: CompileResult) -> list[str]:
    """Print what became of the file; return why it was refused."""
    from maskplan.pipeline.cli.compile_summary import refusal_lines, result_lines

    for line in result_lines(result):
        print_line(line)
    return refusal_lines(result)


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
    verdict = report.verdict.replace("_", " ")
    console.print(
        f"{verdict}: {report.conforming} conforming, {report.violating} violating, {report.dense_by_choice} dense by choice,"
        f" {report.ineligible} ineligible" + (f", {report.unknown} unknown" if report.unknown else ""),
        soft_wrap=True,
    )
