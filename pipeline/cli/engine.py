"""`maskplan engine`: the whole pipeline, from a checkpoint to a checked, compared and timed engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.exit_codes import GateError
from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import choice, override
from maskplan.pipeline.core.choices import FAIL, OFF, REQUIRED, Precision
from maskplan.pipeline.core.errors import OUTPUT_OPTION

_EXAMPLES = """
maskplan engine digits_resnet
maskplan engine resnet50 --weights w.pth --data imagenet --out build/r50
maskplan engine my_net.py:build --weights w.safetensors --data photos
maskplan engine resnet50 --backend tensorrt --repository models
maskplan engine resnet50 --backend tensorrt --refine
maskplan engine resnet50 --weights w.pth --data imagenet --permute
maskplan engine resnet50 --weights w.pth --data imagenet --precision int8
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    add_command(app, engine, _EXAMPLES, _defaults)


def _defaults() -> dict[str, object]:
    from maskplan.pipeline.parity.options import CompareOptions
    from maskplan.pipeline.pruning.mask import MaskOptions

    return {"masks": MaskOptions.method, "max_top1_drop": CompareOptions.max_top1_drop}


def engine(
    context: typer.Context,
    model: options.Model = "digits_resnet",
    weights: options.Weights = "auto",
    ema: options.Ema = None,
    fuse: options.Fuse = False,
    data: options.Data = None,
    masks: Annotated[
        str | None,
        typer.Option(
            help="Mask method (auto: learned if there are images, else magnitude; learned, magnitude, layerwise, "
            "transposable), or a mask file."
        ),
    ] = None,
    permute: Annotated[
        bool,
        typer.Option(help="First reorder channels so that 2:4 masks keep more; the network computes the same."),
    ] = False,
    precision: Annotated[
        Precision | None,
        choice(Precision, "precision", help="By default what can run sparse: fp16 on TensorRT, fp32 on ONNX Runtime."),
    ] = None,
    backend: options.BackendOption = "auto",
    budget_minutes: Annotated[float | None, typer.Option(min=0, help="Time limit for learning masks.")] = None,
    max_top1_drop: Annotated[
        float | None, typer.Option(help="Percentage points of top-1 accuracy that may be lost.")
    ] = None,
    refine: Annotated[
        bool,
        typer.Option(
            help="Restore the dense weights of masked layers that the engine runs dense, build again, and keep the better "
            "engine."
        ),
    ] = False,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the FP16 or INT8 files with NVIDIA's compiler TensorRT-RTX, which needs no GPU, and report what "
            "becomes of each layer: by default where it is installed; with --compile it must be, and must accept them.",
            show_default=False,
        ),
    ] = None,
    repository: Annotated[Path | None, typer.Option(help="Triton model repository to deploy to.")] = None,
    allow_untrained: Annotated[bool, typer.Option(help="Deploy random weights too.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder to write; build/MODEL by default.")] = None,
    classes: options.Classes = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    recipe: options.RecipeFile = None,
    report: options.Report = None,
) -> None:
    """Turn MODEL into a checked, compared and timed engine in the folder --out.

    Finished stages whose inputs have not changed are not run again: the same command continues after an interruption, and on
    another host after the folder was copied.
    """
    from maskplan.exporters.conformance import ConformanceError
    from maskplan.pipeline.cli.compile_summary import refusals
    from maskplan.pipeline.cli.summary import show_summary
    from maskplan.pipeline.core.files import write_atomically
    from maskplan.pipeline.models.checkpoint import ModelOptions
    from maskplan.pipeline.models.registry import folder_name
    from maskplan.pipeline.recipe import read_recipe
    from maskplan.pipeline.report.write import as_typed
    from maskplan.pipeline.run import LineOptions, run

    OUTPUT_OPTION.set("--out")
    settings = read_recipe(recipe, seed)
    learn = override(settings.learn, budget_minutes=budget_minutes)
    settings = override(
        settings,
        learn=learn,
        mask=override(settings.mask, learn=learn),
        compare=override(settings.compare, max_top1_drop=max_top1_drop),
        compile=override(settings.compile, mode=None if compile is None else REQUIRED if compile else OFF),
    )
    line_options = LineOptions(
        model=ModelOptions(model, weights, classes, seed, ema, fuse),
        data=data,
        masks=masks,
        precision=precision,
        backend=backend,
        recipe=settings,
        repository=repository,
        allow_untrained=allow_untrained,
        out=out or Path("build") / folder_name(model),
        device=device,
        refine=refine,
        permute=permute,
        command=as_typed(context.obj or ()),
    )
    try:
        result = run(line_options)
    except ConformanceError as error:
        raise GateError(str(error)) from error
    if report is not None:
        write_atomically(report, result.files.json.path.read_bytes(), option="--report")
    show_summary(result)
    failed = [f"parity: {result.report.parity.reason}"] if result.report.parity.verdict == FAIL else []
    compiled = result.report.compile
    if settings.compile.mode == REQUIRED and compiled is not None and not compiled.accepted:
        failed.append("; ".join(f"compile: {line}" for line in refusals(compiled)))
    if failed:
        raise GateError("\n".join(failed))
