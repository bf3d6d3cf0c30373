"""`maskplan engine`: the whole pipeline, from a checkpoint to a checked, compared and timed engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.exit_codes import GateError
from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import choice, image_options, override, patterns
from maskplan.pipeline.core.choices import FAIL, OFF, REQUIRED, Precision
from maskplan.pipeline.core.errors import OUTPUT_OPTION

if TYPE_CHECKING:
    from maskplan.pipeline.core.choices import MaskMethod

_ONNX = "MODEL is an ONNX file"

_EXAMPLES = """
maskplan engine digits_resnet
maskplan engine resnet50 --weights w.pth --data imagenet --out build/r50
maskplan engine my_net.py:build --weights w.safetensors --data photos
maskplan engine resnet50 --weights w.pth --data photos --images 1024
maskplan engine resnet50 --weights w.pth --synthetic-images 128
maskplan engine resnet50 --backend tensorrt --repository models
maskplan engine resnet50 --backend tensorrt --refine
maskplan engine resnet50 --weights w.pth --data imagenet --permute
maskplan engine resnet50 --weights w.pth --data imagenet --precision int8
maskplan engine detector.onnx --data photos --update --min-sqnr 20
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
    model: Annotated[
        str,
        typer.Argument(
            help="A torchvision model (resnet50), timm/NAME, path/to/file.py:factory, digits_resnet, or an ONNX file.",
            show_default=False,
        ),
    ] = "digits_resnet",
    weights: options.Weights = "auto",
    ema: options.Ema = None,
    fuse: options.Fuse = False,
    outputs: options.Outputs = None,
    data: options.Data = None,
    images: options.Images = None,
    synthetic_images: options.SyntheticImages = None,
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
    max_top1_drop: options.MaxTop1Drop = None,
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
    update: Annotated[
        bool,
        typer.Option(
            "--update",
            help="With layer-wise masks: refit the kept weights by least squares, and correct biases.",
            rich_help_panel=_ONNX,
        ),
    ] = False,
    metric: options.Metric = None,
    max_metric_drop: options.MaxMetricDrop = None,
    min_sqnr: options.MinSqnr = None,
    shape: options.Shape = None,
    mean: options.Mean = None,
    std: options.Std = None,
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

    MODEL may also be an ONNX file of any network: it is pruned layer-wise on --data, or by magnitude without.

    Finished stages whose inputs have not changed are not run again: the same command continues after an interruption, and on
    another host after the folder was copied.
    """
    from maskplan.exporters.conformance import ConformanceError
    from maskplan.pipeline.cli.accuracy_advice import accuracy_advice
    from maskplan.pipeline.cli.compile_summary import refusals
    from maskplan.pipeline.cli.summary import show_summary
    from maskplan.pipeline.core.files import write_atomically
    from maskplan.pipeline.learning.few_images import is_few
    from maskplan.pipeline.models.checkpoint import ModelOptions
    from maskplan.pipeline.models.registry import folder_name
    from maskplan.pipeline.recipe import read_recipe
    from maskplan.pipeline.report.write import as_typed
    from maskplan.pipeline.run import LineOptions, OnnxLineOptions, run, run_onnx
    from maskplan.pipeline.stages.onnx_source import Source

    OUTPUT_OPTION.set("--out")
    settings = read_recipe(recipe, seed)
    learn = override(settings.learn, budget_minutes=budget_minutes)
    settings = override(
        settings,
        learn=learn,
        mask=override(settings.mask, learn=learn, few_images=is_few(images)),
        synthesize=override(settings.synthesize, images=synthetic_images),
        compare=override(
            settings.compare, max_top1_drop=max_top1_drop, min_sqnr_db=min_sqnr, max_metric_drop=max_metric_drop
        ),
        compile=override(settings.compile, mode=None if compile is None else REQUIRED if compile else OFF),
    )
    for_files = {
        "--update": update,
        "--shape": shape,
        "--mean": mean,
        "--std": std,
    }
    for_modules = {
        "--weights": weights != "auto",
        "--ema": ema,
        "--fuse": fuse,
        "--permute": permute,
        "--refine": refine,
        "--images": images is not None,
        "--synthetic-images": synthetic_images is not None,
        "--budget-minutes": budget_minutes is not None,
        "--allow-untrained": allow_untrained,
        "--classes": classes is not None,
        "--device": device != "auto",
        "--compile": compile is not None,
    }
    is_file = model.endswith(".onnx")
    _refuse(for_modules if is_file else for_files, is_file=is_file)
    line_options = LineOptions(
        model=ModelOptions(model, weights, classes, seed, ema, fuse, patterns(outputs) or settings.model.outputs),
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
        images=images,
        synthetic=synthetic_images is not None,
        metric=metric,
        command=as_typed(context.obj or ()),
    )
    try:
        if is_file:
            kinds = line_options.model.outputs
            source = Source(Path(model), data, image_options(shape, mean, std), kinds, metric, update)
            result = run_onnx(
                OnnxLineOptions(
                    source=source,
                    masks=file_method(masks),
                    precision=precision,
                    backend=backend,
                    recipe=settings,
                    repository=repository,
                    out=out or Path("build") / Path(model).stem,
                    seed=seed,
                    command=as_typed(context.obj or ()),
                )
            )
        else:
            result = run(line_options)
    except ConformanceError as error:
        raise GateError(str(error)) from error
    if report is not None:
        write_atomically(report, result.files.json.path.read_bytes(), option="--report")
    show_summary(result)
    failed = [f"parity: {result.report.parity.reason}"] if result.report.parity.verdict == FAIL else []
    if not is_file and (advice := accuracy_advice(result.report)):
        failed.append(f"  fix:   {advice}")
    compiled = result.report.compile
    if settings.compile.mode == REQUIRED and compiled is not None and not compiled.accepted:
        failed.append("; ".join(f"compile: {line}" for line in refusals(compiled)))
    if failed:
        raise GateError("\n".join(failed))


def _refuse(given: Mapping[str, object], *, is_file: bool) -> None:
    """Raise on options that have no effect on this kind of model."""
    from maskplan.pipeline.core.errors import InputError

    names = [name for name, value in given.items() if value]
    if names:
        kind, other = ("an ONNX file", "a module") if is_file else ("a module", "an ONNX file")
        fix = f"remove {'them' if len(names) > 1 else 'it'}"
        raise InputError(f"{', '.join(names)}: for {other}, and MODEL is {kind}", fix=fix)


def file_method(masks: str | None) -> MaskMethod | None:
    """The mask method for an ONNX file; None chooses by whether there is data.

    Raises:
        InputError: Another method than layerwise and magnitude.
    """
    from maskplan.pipeline.core.choices import AUTO, LAYERWISE, MAGNITUDE
    from maskplan.pipeline.core.errors import InputError

    if masks in (None, AUTO):
        return None
    if masks == LAYERWISE:
        return LAYERWISE
    if masks == MAGNITUDE:
        return MAGNITUDE
    fix = "choose layerwise or magnitude; other methods need the module and its weights"
    raise InputError("masks of an ONNX file are layer-wise or by magnitude", found=repr(masks), fix=fix)
