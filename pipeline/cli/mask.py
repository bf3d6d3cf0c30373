"""`maskplan mask`: choose masks for a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import MethodChoice, choice, override, patterns, write_report
from maskplan.pipeline.core.choices import Layout
from maskplan.pipeline.core.terminal import print_line

if TYPE_CHECKING:
    from maskplan.pipeline.core.artifacts import ImageSet

_EXAMPLES = """
maskplan mask resnet50 --method magnitude -o masks.safetensors
maskplan mask resnet50 --weights w.pth --data imagenet --method learned --budget-minutes 60 -o masks.safetensors
maskplan mask resnet50 --weights w.pth --synthetic-images 128 -o masks.safetensors
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    add_command(app, mask, _EXAMPLES, _defaults)


def _defaults() -> dict[str, object]:
    from maskplan.pipeline.pruning.mask import MaskOptions

    return vars(MaskOptions())


def mask(
    model: options.Model,
    out: options.Out = Path("masks.safetensors"),
    method: Annotated[
        MethodChoice | None,
        choice(
            MethodChoice,
            "mask method",
            metavar="<method>",
            help="auto (learned if there are images, else magnitude), learned, magnitude, layerwise (smallest change of "
            "each layer's outputs; needs images, but no labels), transposable (N:M along C and along K), or "
            "danhofer2024 (for comparison only).",
        ),
    ] = None,
    weights: options.Weights = "auto",
    ema: options.Ema = None,
    fuse: options.Fuse = False,
    outputs: options.Outputs = None,
    data: options.Data = None,
    images: options.Images = None,
    synthetic_images: options.SyntheticImages = None,
    pattern: options.Pattern = None,
    layout: Annotated[
        Layout | None,
        choice(Layout, "layout", help="Groups along C, as TensorRT needs, or flat (for comparison; not deployable)."),
    ] = None,
    include_linear: options.IncludeLinear = None,
    layers: options.Layers = None,
    min_channels: options.MinChannels = None,
    keep_dense_budget: Annotated[
        float | None,
        typer.Option(help="Percent of the MACs that may stay dense: the layers whose masks cost most accuracy."),
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="Mask file, or checkpoint with pruning masks, to start learning from.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted run of the same command.")] = False,
    log_dir: Annotated[
        Path | None, typer.Option(help="Folder for learning.csv (and TensorBoard files, if it is installed).")
    ] = None,
    budget_minutes: Annotated[float | None, typer.Option(min=0, help="Time limit for learning.")] = None,
    classes: options.Classes = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    recipe: options.RecipeFile = None,
    report: options.Report = None,
) -> None:
    """Choose masks for MODEL; its weights do not change.

    Under `torchrun` all processes learn the same masks, each from its own share of the images.
    """
    from maskplan.pipeline.core.progress import is_main_process
    from maskplan.pipeline.data.few_images import limit_images
    from maskplan.pipeline.data.image_sets import identify
    from maskplan.pipeline.data.source import find_dataset
    from maskplan.pipeline.data.synthetic import refuse_data
    from maskplan.pipeline.learning.few_images import is_few
    from maskplan.pipeline.learning.options import LearnerFiles
    from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
    from maskplan.pipeline.models.synthesize import synthesize_dataset
    from maskplan.pipeline.pruning.mask import choose_masks, needs_images
    from maskplan.pipeline.pruning.method import resolve_method
    from maskplan.pipeline.recipe import read_recipe
    from maskplan.pipeline.report.write import masks_values

    stages = read_recipe(recipe, seed)
    settings, kinds = stages.mask, patterns(outputs) or stages.model.outputs
    module, provenance = open_checkpoint(ModelOptions(model, weights, classes, seed, ema, fuse, kinds))
    if synthetic_images is None:
        dataset = find_dataset(
            data, model=model, labels=provenance.labels, outputs=provenance.classes, seed=seed, needs_classes=False
        )
    else:
        refuse_data(data)
        synthesize = override(stages.synthesize, images=synthetic_images)
        dataset = synthesize_dataset(module, provenance, synthesize, device)
    if dataset is not None and images is not None:
        dataset = limit_images(dataset, images, seed)
    mask_options = override(
        settings,
        few_images=is_few(images),
        method=resolve_method(
            method or settings.method, has_images=dataset is not None, synthetic=synthetic_images is not None
        ),
        pattern=pattern,
        layout=layout,
        include_linear=include_linear,
        layers=patterns(layers),
        min_channels=min_channels,
        keep_dense_budget=keep_dense_budget,
        learn=override(settings.learn, budget_minutes=budget_minutes),
    )
    image_sets: tuple[ImageSet, ...] = ()
    if dataset is not None and needs_images(mask_options, mask_options.method):
        image_sets = (identify(dataset.train), identify(dataset.select))
    files = LearnerFiles(out.with_name(f"{out.name}.learning"), resume, log_dir)
    masks = choose_masks(
        module, provenance, mask_options, out, dataset, image_sets, init=init, files=files, device=device
    )
    if not is_main_process():
        return
    write_report(report, masks_values(masks, out.parent))
    print_line(
        f"{out}: {masks.pattern} masks ({masks.method}) for {len(masks.masked)} layers; {len(masks.dense)} stay dense"
    )
