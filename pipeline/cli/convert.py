"""`maskplan convert`: an unstructured sparse checkpoint to N:M."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import override, patterns, write_report
from maskplan.pipeline.core.terminal import print_line

if TYPE_CHECKING:
    from maskplan.pipeline.pruning.convert import ConversionReport

_EXAMPLES = """
maskplan convert resnet50 --weights sparse50.pth --data imagenet -o sparse.safetensors
maskplan convert resnet50 --weights sparse50.pth --data imagenet --no-update -o sparse.safetensors
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    add_command(app, convert, _EXAMPLES, _defaults)


def _defaults() -> dict[str, object]:
    from maskplan.pipeline.pruning.convert import ConvertOptions

    return vars(ConvertOptions())


def convert(
    model: options.Model,
    out: options.Out = Path("converted.safetensors"),
    weights: options.Weights = "auto",
    ema: options.Ema = None,
    fuse: options.Fuse = False,
    outputs: options.Outputs = None,
    data: options.Data = None,
    update: Annotated[
        bool | None,
        typer.Option("--update/--no-update", help="Fit the kept weights to restore each layer's outputs."),
    ] = None,
    pattern: options.Pattern = None,
    images: Annotated[int | None, typer.Option(min=1, help="Training images to use; labels are not needed.")] = None,
    damping: Annotated[
        float | None,
        typer.Option(min=0, help="Pulls fitted weights to the old ones; relative to the mean square of the inputs."),
    ] = None,
    include_linear: options.IncludeLinear = None,
    layers: options.Layers = None,
    min_channels: Annotated[
        int | None, typer.Option(min=0, help="Skip convolutions with fewer input channels.")
    ] = None,
    classes: options.Classes = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    recipe: options.RecipeFile = None,
    report: options.Report = None,
) -> None:
    """Convert unstructured zeros to N:M, layer by layer on a few images, and report the loss.

    BatchNorm statistics are estimated again, with the options of the recipe's table `recalibrate`.
    """
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.core.serialization import encode
    from maskplan.pipeline.data.image_sets import identify
    from maskplan.pipeline.data.source import find_dataset
    from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
    from maskplan.pipeline.pruning.convert import ConvertOptions
    from maskplan.pipeline.pruning.convert import convert as convert_checkpoint
    from maskplan.pipeline.recipe import read_recipe

    convert_options = override(
        ConvertOptions(seed=seed),
        pattern=pattern,
        update=update,
        images=images,
        damping=damping,
        include_linear=include_linear,
        layers=patterns(layers),
        min_channels=min_channels,
    )
    settings = read_recipe(recipe, seed)
    kinds = patterns(outputs) or settings.model.outputs
    module, provenance = open_checkpoint(ModelOptions(model, weights, classes, seed, ema, fuse, kinds))
    dataset = find_dataset(
        data, model=model, labels=provenance.labels, outputs=provenance.classes, seed=seed, needs_classes=False
    )
    if dataset is None:
        raise InputError("conversion needs images", fix="give --data DIR with train/ and val/")
    image_sets = (identify(dataset.train),)
    converted, loss = convert_checkpoint(
        module, provenance, dataset, convert_options, settings.recalibrate, out, image_sets, device
    )
    write_report(report, encode(loss))
    print_line(f"{out}: {loss.pattern} on {len(loss.layers)} layers, {converted.bytes:,} bytes")
    _show(loss)


def _show(loss: ConversionReport) -> None:
    for layer in loss.layers:
        updated = "" if layer.updated_error is None else f", {layer.updated_error:.2f}% after the update"
        print_line(
            f"  {layer.name}: {layer.zeros:.1f}% zeros, {layer.dropped:.1f}% of the rest dropped;"
            f" output error {layer.error:.2f}%{updated}"
        )
    where = f"on {loss.select_images} held-out training images"
    recalibrated = f"({loss.recalibrated_images} images recalibrated)"
    if loss.select_top1_source is None:
        print_line(f"divergence of the outputs {where}: {loss.select_divergence:.4f} {recalibrated}")
    else:
        print_line(
            f"top-1 {where}: {loss.select_top1_source:.2f}% before, {loss.select_top1_converted:.2f}% after {recalibrated}"
        )
