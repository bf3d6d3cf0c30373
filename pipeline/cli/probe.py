"""`probe`: the masks on this GPU's sparse tensor cores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.gates import GateError

if TYPE_CHECKING:
    import onnx

    from maskplan.engines.probe import ProbeReport

_EXAMPLES = """Examples:\n
  maskplan probe build/r50/sparse.safetensors --report probe.json\n
  maskplan probe sparse.onnx --dtype int8 --batch 1,32
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(epilog=_EXAMPLES)(probe)


def probe(
    source: Annotated[
        Path,
        typer.Argument(
            help="An ONNX file of any tool, or a checkpoint of maskplan whose model is no file of your own.",
            show_default=False,
        ),
    ],
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8,32",
    dtype: Annotated[str, typer.Option(help="fp16, bf16 or int8.")] = "fp16",
    report: options.Report = None,
) -> None:
    """Ask this GPU, by PyTorch's cuSPARSELt, whether it takes the 2:4 weights, computes the same, and is faster.

    Exit code 1 if a weight is refused, comes back changed, or computes something else. Speed is told, not judged.
    """
    from maskplan.engines.cusparselt import cusparselt_host
    from maskplan.engines.probe import ProbeOptions
    from maskplan.engines.probe import probe as probe_weights
    from maskplan.exporters.conformance import CheckOptions, check_2to4
    from maskplan.exporters.layer_shapes import shaped_weights
    from maskplan.exporters.lazy_load import load_mapped
    from maskplan.pipeline.core.choices import CONFORMING, FAIL, VIOLATING
    from maskplan.pipeline.core.errors import InputError, listed
    from maskplan.pipeline.core.files import write_json
    from maskplan.pipeline.core.serialization import encode

    sizes = [part.strip() for part in batch.split(",")]
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise InputError("not a list of batch sizes", found=repr(batch), fix="write for example --batch 1,8,32")
    how = ProbeOptions(tuple(map(int, sizes)), dtype)
    host = cusparselt_host()
    model = _traced(source) if source.suffix == ".safetensors" else load_mapped(source)
    folder = source.parent
    checked = check_2to4(model if source.suffix == ".safetensors" else source, CheckOptions(pattern="2:4"))
    names = {w.name for w in checked.weights if w.verdict in (CONFORMING, VIOLATING)}
    found = shaped_weights(model, names, folder)
    if not found.shapes:
        raise InputError(
            "no weight to probe",
            where=source,
            found=listed(f"{name}: {why}" for name, why in found.left_out.items()) or checked.reason,
            fix="give a model with 2:4 weights: see maskplan check",
        )
    told = probe_weights(found.weights, found.shapes, how, host)
    if report is not None:
        write_json(report, encode(told))
    _show(told)
    for name, why in found.left_out.items():
        print(f"left out: {name}: {why}")
    if told.verdict == FAIL:
        raise GateError(f"{source}: {told.reason}")


def _traced(path: Path) -> onnx.ModelProto:
    """The graph of a checkpoint, which tells the sizes that its weights work on."""
    from maskplan.exporters.onnx_export import trace
    from maskplan.pipeline.models.checkpoint import read_checkpoint, rebuilt

    checkpoint = read_checkpoint(path)
    return trace(rebuilt(checkpoint), checkpoint.provenance)


def _show(report: ProbeReport) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("weight", no_wrap=True)
    for title in ("K x C x R x S", "input", "verdict"):
        table.add_column(title)
    for b in next((layer.batches for layer in report.layers if layer.batches), ()):
        table.add_column(f"at {b.batch}", justify="right")
    for layer in report.layers:
        shape = layer.shape
        size = f"{shape.k} x {shape.c} x {shape.r} x {shape.s}"
        gains = [
            "-" if b.dense_gemm_ms is None or not b.sparse_gemm_ms else f"{b.dense_gemm_ms / b.sparse_gemm_ms:.2f}"
            for b in layer.batches
        ]
        table.add_row(layer.name, size, f"{shape.height} x {shape.width}", layer.verdict.replace("_", " "), *gains)
    console = Console(highlight=False, markup=False)
    console.print(table)
    for layer in report.layers:
        if layer.reason is not None:
            console.print(f"{layer.name}: {layer.reason}", soft_wrap=True)
    versions = f"torch {report.torch_version}, CUDA {report.cuda_version}, cuSPARSELt {report.cusparselt_version}"
    console.print(f"{report.device} ({report.compute_capability}), {report.dtype}, {versions}", soft_wrap=True)
    console.print(f"numbers: the dense product's time over the sparse one's; {report.note}", soft_wrap=True)
    console.print(f"{report.verdict}{': ' + report.reason if report.reason else ''}", soft_wrap=True)
