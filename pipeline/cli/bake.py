"""`maskplan bake`: masks times weights, written as a pruned checkpoint."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import override
from maskplan.pipeline.core.terminal import print_line

_EXAMPLES = """
maskplan bake resnet50 --masks masks.safetensors --weights new.pth -o sparse.safetensors
maskplan bake resnet50 --masks masks.safetensors --weights w.pth --recalibrate imagenet -o sparse.safetensors
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    add_command(app, bake, _EXAMPLES)


def bake(
    model: options.Model,
    masks: Annotated[Path, typer.Option(help="Mask file, or a checkpoint with pruning masks (torch prune, ASP).")],
    out: options.Out = Path("sparse.safetensors"),
    weights: options.Weights = "auto",
    ema: options.Ema = None,
    fuse: options.Fuse = False,
    recalibrate: Annotated[
        Path | None, typer.Option(help="Data folder; its train/ images recalibrate the BatchNorm statistics.")
    ] = None,
    synthetic_images: options.SyntheticImages = None,
    classes: options.Classes = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    recipe: options.RecipeFile = None,
) -> None:
    """Set masked weights to zero and write the pruned checkpoint; the weights may be newer than the masks."""
    from maskplan.pipeline.data.image_sets import identify
    from maskplan.pipeline.data.source import find_dataset
    from maskplan.pipeline.data.synthetic import refuse_data
    from maskplan.pipeline.models.batchnorm import recalibrate as recalibrate_batchnorm
    from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
    from maskplan.pipeline.models.state_dict import fit_weights, read_weights
    from maskplan.pipeline.models.synthesize import synthesize_dataset
    from maskplan.pipeline.pruning.bake import bake as bake_masks
    from maskplan.pipeline.pruning.mask import masks_from_file
    from maskplan.pipeline.recipe import read_recipe

    settings = read_recipe(recipe, seed)
    kinds = settings.model.outputs
    module, provenance = open_checkpoint(ModelOptions(model, weights, classes, seed, ema, fuse, kinds))
    labels, count = provenance.labels, provenance.classes
    dataset = None
    if synthetic_images is not None:
        refuse_data(recalibrate)
        synthesize = override(settings.synthesize, images=synthetic_images)
        dataset = synthesize_dataset(module, provenance, synthesize, device)
    elif recalibrate is not None:
        dataset = find_dataset(recalibrate, model=model, labels=labels, outputs=count, seed=seed, needs_classes=False)
    with tempfile.TemporaryDirectory(prefix="maskplan-") as folder:
        converted = Path(folder) / "masks.safetensors"
        mask_set = masks_from_file(module, provenance, masks, converted=converted)
        pruned = bake_masks(module, provenance, mask_set, out if dataset is None else Path(folder) / out.name)
        if dataset is not None:
            dense = copy.deepcopy(module)
            fit_weights(module, read_weights(pruned.path), where=pruned.path)
    if dataset is not None:
        image_sets = (identify(dataset.train),)
        pruned = recalibrate_batchnorm(
            module, pruned.provenance, dataset.train, settings.recalibrate, out, image_sets, dense
        )
    print_line(f"{pruned.path}: {mask_set.pattern} on {len(mask_set.masked)} layers, {pruned.bytes:,} bytes")
