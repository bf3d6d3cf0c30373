"""`maskplan prune`: make the weights of an ONNX file N:M, without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.check import conformance_defaults
from maskplan.pipeline.cli.exit_codes import GateError
from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import override, patterns, write_report
from maskplan.pipeline.core.terminal import print_line

_EXAMPLES = """
maskplan prune model.onnx -o sparse.onnx
maskplan prune model.onnx --allow-dense 'head.*' -o sparse.onnx
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    add_command(app, prune, _EXAMPLES, conformance_defaults)


def prune(
    model: options.OnnxFile,
    out: options.Out = Path("sparse.onnx"),
    pattern: options.Pattern = None,
    allow_dense: Annotated[
        list[str] | None, typer.Option(help="Pattern of names of weights or nodes to leave dense. Repeatable.")
    ] = None,
    report: options.Report = None,
) -> None:
    """Prune the weights of an ONNX file to N:M by magnitude, then check the result."""
    from maskplan.exporters.conformance import CheckOptions, check_2to4
    from maskplan.exporters.prune import prune_onnx
    from maskplan.pipeline.core.serialization import encode
    from maskplan.pipeline.masking.patterns import parse_pattern

    check_options = override(CheckOptions(strict=True), pattern=pattern, allow_dense=patterns(allow_dense))
    pruned = prune_onnx(model, out, parse_pattern(check_options.pattern), check_options.allow_dense)
    conformance = check_2to4(out, check_options)
    write_report(report, encode(conformance))
    print_line(
        f"{out}: {pruned.changed} of {pruned.weights} weights changed, {pruned.zeroed:,} elements set to zero;"
        f" {conformance.verdict}"
    )
    for name, reason in pruned.left_dense:
        print_line(f"  {name} stays dense: {reason.replace('_', ' ')}")
    if not conformance.passed:
        raise GateError(f"{out}: {conformance.reason}")
