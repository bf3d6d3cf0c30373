"""`convert`: an unstructured sparse checkpoint to N:M."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskplan.pipeline.cli import options

_EXAMPLES = """Examples:\n
  maskplan convert resnet50 --weights sparse50.pth --data imagenet -o sparse.safetensors\n
  maskplan convert resnet50 --weights sparse50.pth --data imagenet --no-update -o sparse.safetensors
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(epilog=_EXAMPLES)(convert)


def convert(
    model: options.Model,
    out: options.Out = Path("converted.safetensors"),
    weights: options.Weights = "auto",
    data: options.Data = None,
    update: Annotated[
        bool, typer.Option("--update/--no-update", help="Fit the kept weights to give each layer's outputs back.")
    ] = True,
    pattern: Annotated[str, typer.Option(help="N:M, at most N non-zeros in each group of M.")] = "2:4",
    images: Annotated[int, typer.Option(min=1, help="Training images to convert on; their labels are not used.")] = 512,
    damping: Annotated[
        float, typer.Option(min=0, help="How far fitted weights are held to the old, of the inputs' mean square.")
    ] = 0.01,
    include_linear: Annotated[bool, typer.Option(help="Convert linear layers too.")] = False,
    layers: Annotated[
        list[str] | None, typer.Option(help="Only weights whose name matches, such as 'layer3.*'; repeatable.")
    ] = None,
    min_channels: Annotated[int, typer.Option(min=0, help="Leave layers with fewer input channels as they are.")] = 0,
    classes: options.Classes = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    recipe: options.RecipeFile = None,
    report: options.Report = None,
) -> None:
    """Turn zeros that lie anywhere into N:M, layer by layer on a few images, and say what was lost.

    BatchNorm statistics are estimated anew, as `[recalibrate]` of the recipe says.
    """
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.core.files import write_json
    from maskplan.pipeline.core.serialization import encode
    from maskplan.pipeline.data.dataset import identify, open_folder
    from maskplan.pipeline.data.digits import load_digits
    from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
    from maskplan.pipeline.models.registry import BUNDLED
    from maskplan.pipeline.pruning.convert import ConvertOptions
    from maskplan.pipeline.pruning.convert import convert as convert_stage
    from maskplan.pipeline.recipe import read_recipe

    how = ConvertOptions(pattern, update, images, damping, include_linear, tuple(layers or ()), min_channels, seed)
    chosen = read_recipe(recipe, seed)
    module, provenance = open_checkpoint(ModelOptions(model, weights, classes, seed))
    if data is not None:
        found = open_folder(data, provenance.labels, provenance.classes, seed)
    elif model == BUNDLED and provenance.classes == 10:
        found = load_digits()
    else:
        raise InputError("conversion needs images", fix="give --data DIR with train/ and val/")
    sets = (identify(found.train),)
    written, lost = convert_stage(module, provenance, found, how, chosen.recalibrate, out, sets, device)
    if report is not None:
        write_json(report, encode(lost))
    print(f"{out}: {lost.pattern} on {len(lost.layers)} layers, {written.bytes:,} bytes")
    for layer in lost.layers:
        fitted = "" if layer.updated_error is None else f", {layer.updated_error:.2f}% after the update"
        print(
            f"  {layer.name}: {layer.zeros:.1f}% zeros, {layer.dropped:.1f}% of the rest dropped;"
            f" outputs off by {layer.error:.2f}%{fitted}"
        )
    print(
        f"top-1 on {lost.select_images} images set aside: {lost.select_top1_source:.2f}% before,"
        f" {lost.select_top1_converted:.2f}% after ({lost.recalibrated_images} images recalibrated)"
    )
