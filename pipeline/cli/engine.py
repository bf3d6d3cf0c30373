"""`maskplan engine`: the whole line, and the table at its end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.gates import GateError

if TYPE_CHECKING:
    from maskplan.pipeline.core.reports import MethodRow
    from maskplan.pipeline.run import LineResult

_EXAMPLES = """Examples:\n
  maskplan engine digits_resnet\n
  maskplan engine resnet50 --weights w.pth --data imagenet --out build/r50\n
  maskplan engine my_net.py:build --weights w.safetensors --data photos\n
  maskplan engine resnet50 --backend tensorrt --repository models\n
  maskplan engine resnet50 --backend tensorrt --refine\n
  maskplan engine resnet50 --weights w.pth --data imagenet --permute\n
  maskplan engine resnet50 --weights w.pth --data imagenet --precision int8
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(epilog=_EXAMPLES)(engine)


def engine(
    context: typer.Context,
    model: options.Model = "digits_resnet",
    weights: options.Weights = "auto",
    data: options.Data = None,
    masks: Annotated[
        str | None,
        typer.Option(
            help="auto (learned where there are images), learned, magnitude, layerwise, transposable, or a mask file."
        ),
    ] = None,
    permute: Annotated[
        bool,
        typer.Option(help="First bring channels into an order of which 2:4 keeps more; the function stays the same."),
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, fp16 or int8; by default what can run sparse: fp16 on TensorRT, fp32 elsewhere."),
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, tensorrt or onnxruntime.")] = "auto",
    budget_minutes: Annotated[float | None, typer.Option(min=0, help="Stop learning masks after this long.")] = None,
    max_top1_drop: Annotated[
        float | None, typer.Option(help="Points of top-1 that may be lost; 1.0 by default.")
    ] = None,
    refine: Annotated[
        bool,
        typer.Option(
            help="Masked layers that the engine runs dense get their dense weights back; built again, the better is kept."
        ),
    ] = False,
    repository: Annotated[Path | None, typer.Option(help="Triton model repository to deploy to.")] = None,
    allow_untrained: Annotated[bool, typer.Option(help="Deploy even random weights.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder to write; build/MODEL by default.")] = None,
    classes: options.Classes = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    recipe: options.RecipeFile = None,
    report: options.Report = None,
) -> None:
    """Take MODEL to a checked, compared and timed engine in DIR (build/MODEL).

    Stages that are done and unchanged are not run again, so the same command goes on after an interruption, and on another
    host after copying DIR.
    """
    from maskplan.pipeline.core.choices import FP16, FP32, INT8
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.core.files import write_atomically
    from maskplan.pipeline.models.checkpoint import ModelOptions
    from maskplan.pipeline.models.registry import folder_name
    from maskplan.pipeline.recipe import read_recipe
    from maskplan.pipeline.report.write import as_typed
    from maskplan.pipeline.run import LineOptions, run
    from maskplan.pipeline.stages.model import ConformanceError

    chosen = read_recipe(recipe, seed)
    if budget_minutes is not None:
        learn = replace(chosen.learn, budget_minutes=budget_minutes)
        chosen = replace(chosen, learn=learn, mask=replace(chosen.mask, learn=learn))
    if max_top1_drop is not None:
        chosen = replace(chosen, compare=replace(chosen.compare, max_top1_drop=max_top1_drop))
    if precision not in (None, FP32, FP16, INT8):
        raise InputError(f"unknown precision {precision!r}", fix="choose fp32, fp16 or int8")
    folder = out or Path("build") / folder_name(model)
    try:
        finished = run(
            LineOptions(
                model=ModelOptions(model, weights, classes, seed),
                data=data,
                masks=masks,
                precision=precision,
                backend=backend,
                recipe=chosen,
                repository=repository,
                allow_untrained=allow_untrained,
                out=folder,
                device=device,
                refine=refine,
                permute=permute,
                command=as_typed(context.obj or ()),
            )
        )
    except ConformanceError as error:
        raise GateError(str(error)) from error
    if report is not None:
        write_atomically(report, finished.files.json.path.read_bytes())
    show(finished, folder)
    if finished.report.parity.verdict == "fail":
        raise GateError(f"parity: {finished.report.parity.reason}")


def show(finished: LineResult, folder: Path) -> None:
    """Print the final table, what was written, and the next command."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    # Paths may hold what rich would take for markup.
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        # A file has no width: names stay whole.
        console.width = max(console.width, 120)
    report = finished.report
    table = Table(
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        title_style="bold",
        title=f"{report.model.model}, {report.precision} on {report.engine.backend}",
        title_justify="left",
    )
    table.add_column("weights", no_wrap=True)
    for title in ("top-1 %", "top-5 %", "drop", "MB"):
        table.add_column(title, justify="right")
    for batch in report.timing.batches:
        table.add_column(f"ms at {batch.batch}", justify="right")

    def times(name: str) -> list[str]:
        return [f"{getattr(b, name).p50_ms:.3g}" for b in report.timing.batches]

    last = report.masks.method
    rows: dict[str, MethodRow | None] = {row.name: row for row in report.parity.methods}
    rows = rows or {"dense": None, last: None}
    # The timed engines are of one precision; the row that the gate compares with is the untouched model's.
    untouched = "dense" if report.calibration is None or len(rows) == 2 else "dense, INT8"
    for name, row in rows.items():
        accuracy = ["", "", ""] if row is None else [f"{row.top1:.2f}", f"{row.top5:.2f}", f"{row.drop:+.2f}"]
        timed = {untouched: ("dense", report.dense_engine), list(rows)[-1]: ("sparse", report.engine)}.get(name)
        size = f"{timed[1].bytes / 1e6:.2f}" if timed else ""
        table.add_row(name, *accuracy, size, *(times(timed[0]) if timed else []))
    console.print(table)
    conformance, parity = report.conformance, report.parity
    conforming = f"{conformance.conforming} of {conformance.eligible} eligible weights are {conformance.pattern}"
    console.print(f"conformance  {conformance.verdict}: {conforming}")
    why = f": {parity.reason}" if parity.reason else f": {parity.images} images, {parity.agreement:.2f}% agreement"
    console.print(f"parity       {parity.verdict.replace('_', ' ')}{why}", soft_wrap=True)
    if report.calibration is not None:
        done = report.calibration
        left = f", {len(done.in_float)} in floats" if done.in_float else ""
        console.print(
            f"calibration  {done.method} on {done.images} images: {done.quantized_layers} layers in INT8{left}"
        )
    if report.permutation is not None:
        moved = report.permutation
        gain = 100 * (moved.kept_after / moved.kept_before - 1)
        console.print(f"permutation  kept magnitude {gain:+.2f}%, efficacy {moved.efficacy:.1f}")
    elif report.permutation_reason is not None:
        console.print(f"permutation  none: {report.permutation_reason}", soft_wrap=True)
    if report.timing.note:
        console.print(f"timing       {report.timing.note}", soft_wrap=True)
    if report.refine is not None:
        restored = f"{report.refine.kept} engine kept" if report.refine.refined else "skipped"
        console.print(f"refine       {restored}: {report.refine.reason}", soft_wrap=True)
    if not report.model.trained:
        console.print("UNTRAINED    the weights are random: good for timing, not for use", soft_wrap=True)
    console.print(f"engine       {short(report.engine.path)}", soft_wrap=True)
    console.print(f"report       {short(finished.files.html.path)}", soft_wrap=True)
    if finished.deployment is not None:
        console.print(
            f"deployed     {finished.deployment.folder}, version {finished.deployment.version}",
            soft_wrap=True,
        )
    elif report.model.trained and parity.verdict != "fail":
        console.print(f"next         maskplan deploy {short(report.engine.path)} --repository models", soft_wrap=True)
    else:
        console.print(f"next         maskplan inspect {short(report.engine.path)}", soft_wrap=True)


def short(path: Path) -> Path:
    """Relative to where the user stands, if it lies below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
