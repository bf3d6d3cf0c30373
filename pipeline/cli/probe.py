"""`maskplan probe`: test masks on this GPU's sparse tensor cores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.exit_codes import GateError
from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import override, parse_batch_sizes, write_report

if TYPE_CHECKING:
    import onnx

    from maskplan.engines.probe import ProbeReport

_EXAMPLES = """
maskplan probe build/r50/sparse.safetensors --report probe.json
maskplan probe sparse.onnx --dtype int8 --batch 1,32
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    add_command(app, probe, _EXAMPLES, _defaults)


def _defaults() -> dict[str, object]:
    from maskplan.engines.probe import ProbeOptions

    return {"batch": ProbeOptions().batches, "dtype": ProbeOptions().dtype}


def probe(
    source: Annotated[
        Path,
        typer.Argument(
            help="An ONNX file of any tool, or a checkpoint that maskplan wrote (not of a model from a .py file).",
            show_default=False,
        ),
    ],
    batch: Annotated[str | None, typer.Option(help="Batch sizes, separated by commas.")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="fp16|bf16|int8", help="Type of weights and inputs.")] = None,
    report: options.Report = None,
) -> None:
    """Test with PyTorch's cuSPARSELt whether this GPU accepts the 2:4 weights, computes the same, and is faster.

    Exit code 1 if a weight is rejected, comes back changed, or gives wrong outputs. Speed is shown, not judged.
    """
    from maskplan.engines.cusparselt import find_cusparselt_host
    from maskplan.engines.probe import ProbeOptions
    from maskplan.engines.probe import probe as probe_weights
    from maskplan.exporters.conformance import CheckOptions, check_2to4
    from maskplan.exporters.layer_shapes import shaped_weights
    from maskplan.exporters.lazy_load import load_lazily
    from maskplan.pipeline.core.choices import CONFORMING, FAIL, VIOLATING
    from maskplan.pipeline.core.errors import InputError, listed
    from maskplan.pipeline.core.serialization import encode

    probe_options = override(ProbeOptions(), batches=parse_batch_sizes(batch), dtype=dtype)
    host = find_cusparselt_host()
    is_checkpoint = source.suffix == ".safetensors"
    model = _trace_checkpoint(source) if is_checkpoint else load_lazily(source)
    conformance = check_2to4(model if is_checkpoint else source, CheckOptions())
    names = {w.name for w in conformance.weights if w.verdict in (CONFORMING, VIOLATING)}
    shaped = shaped_weights(model, names, source.parent)
    if not shaped.shapes:
        raise InputError(
            "no weight to probe",
            where=source,
            found=listed(f"{name}: {reason}" for name, reason in shaped.skipped.items()) or conformance.reason,
            fix="give a model with 2:4 weights; see maskplan check",
        )
    result = probe_weights(shaped.weights, shaped.shapes, probe_options, host)
    write_report(report, encode(result))
    _show(result)
    for name, reason in shaped.skipped.items():
        print(f"left out: {name}: {reason}")
    if result.verdict == FAIL:
        raise GateError(f"{source}: {result.reason}")


def _trace_checkpoint(path: Path) -> onnx.ModelProto:
    """The ONNX graph of a checkpoint; it gives the sizes of the layers' inputs."""
    from maskplan.exporters.onnx_export import trace
    from maskplan.pipeline.models.checkpoint import read_checkpoint, rebuild_module

    checkpoint = read_checkpoint(path)
    return trace(rebuild_module(checkpoint), checkpoint.provenance)


def _show(report: ProbeReport) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from maskplan.pipeline.core.console import stdout_console
    from maskplan.pipeline.core.escaping import one_line

    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("weight", no_wrap=True)
    for title in ("K x C x R x S", "input", "verdict"):
        table.add_column(title)
    for b in next((layer.batches for layer in report.layers if layer.batches), ()):
        table.add_column(f"at {b.batch}", justify="right")
    for layer in report.layers:
        shape = layer.shape
        size = f"{shape.k} x {shape.c} x {shape.r} x {shape.s}"
        speedups = [
            "-" if b.dense_gemm_ms is None or not b.sparse_gemm_ms else f"{b.dense_gemm_ms / b.sparse_gemm_ms:.2f}"
            for b in layer.batches
        ]
        table.add_row(
            one_line(layer.name), size, f"{shape.height} x {shape.width}", layer.verdict.replace("_", " "), *speedups
        )
    console = stdout_console()
    console.print(table)
    for layer in report.layers:
        if layer.reason is not None:
            console.print(one_line(f"{layer.name}: {layer.reason}"), soft_wrap=True)
    versions = f"torch {report.torch_version}, CUDA {report.cuda_version}, cuSPARSELt {report.cusparselt_version}"
    console.print(f"{report.device} ({report.compute_capability}), {report.dtype}, {versions}", soft_wrap=True)
    console.print(f"numbers: time of the dense product over time of the sparse one; {report.note}", soft_wrap=True)
    console.print(f"{report.verdict}{': ' + report.reason if report.reason else ''}", soft_wrap=True)
