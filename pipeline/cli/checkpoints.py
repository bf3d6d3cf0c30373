"""`mask`, `bake` and `export`: the stages that work on PyTorch checkpoints."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options

if TYPE_CHECKING:
    from maskplan.pipeline.data.dataset import Dataset


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command(epilog="Example:\n\n  maskplan mask resnet50 --method magnitude -o masks.safetensors")(mask)
    app.command(
        epilog="Example:\n\n  maskplan bake resnet50 --masks masks.safetensors --weights new.pth -o sparse.safetensors"
    )(bake)
    app.command(epilog="Example:\n\n  maskplan export resnet50 --weights sparse.safetensors -o sparse.onnx")(export)


def mask(
    model: options.Model,
    out: options.Out = Path("masks.safetensors"),
    method: Annotated[
        str | None,
        typer.Option(
            help="auto (learned where there are images), learned, magnitude, layerwise (least change of each layer's "
            "outputs; needs images, no labels), transposable (along C and K at once), or report (for comparison only)."
        ),
    ] = None,
    weights: options.Weights = "auto",
    data: options.Data = None,
    pattern: Annotated[
        str | None, typer.Option(help="N:M, at most N non-zeros in each group of M; 2:4 by default.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="channel (TensorRT's, the default) or flat (for comparison; cannot be deployed).")
    ] = None,
    include_linear: Annotated[bool, typer.Option(help="Mask linear layers too.")] = False,
    layers: Annotated[
        list[str] | None, typer.Option(help="Mask only weights whose name matches, such as 'layer3.*'; repeatable.")
    ] = None,
    min_channels: Annotated[int | None, typer.Option(help="Leave layers with fewer input channels dense.")] = None,
    keep_dense_budget: Annotated[
        float | None,
        typer.Option(help="Percent of the MACs that may stay dense, in the layers that cost most accuracy."),
    ] = None,
    init: Annotated[Path | None, typer.Option(help="Mask file to start learning from.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from where an interrupted run of this command stood.")] = False,
    log_dir: Annotated[
        Path | None, typer.Option(help="Folder for learning.csv (and TensorBoard, if installed).")
    ] = None,
    budget_minutes: Annotated[float | None, typer.Option(min=0, help="Stop learning after this long.")] = None,
    classes: options.Classes = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    recipe: options.RecipeFile = None,
    report: options.Report = None,
) -> None:
    """Choose masks for MODEL; its weights stay as they are.

    Under `torchrun` all processes learn the same masks, each from its own share of the images.
    """
    from maskplan.pipeline.core.files import write_json
    from maskplan.pipeline.core.progress import is_main_process
    from maskplan.pipeline.data.dataset import identify
    from maskplan.pipeline.learning.options import LearnFiles
    from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
    from maskplan.pipeline.pruning.mask import choose_masks, looks_at_images, method_for
    from maskplan.pipeline.recipe import read_recipe
    from maskplan.pipeline.report.write import masks_values

    chosen = read_recipe(recipe, seed)
    module, provenance = open_checkpoint(ModelOptions(model, weights, classes, seed))
    dataset = _dataset(model, data, provenance.labels, provenance.classes, seed)
    learn = replace(chosen.learn, budget_minutes=budget_minutes) if budget_minutes is not None else chosen.learn
    how = replace(
        chosen.mask,
        method=method_for(method or chosen.mask.method, dataset is not None),
        pattern=pattern or chosen.mask.pattern,
        layout=layout or chosen.mask.layout,
        include_linear=include_linear or chosen.mask.include_linear,
        layers=tuple(layers) if layers else chosen.mask.layers,
        min_channels=chosen.mask.min_channels if min_channels is None else min_channels,
        keep_dense_budget=chosen.mask.keep_dense_budget if keep_dense_budget is None else keep_dense_budget,
        learn=learn,
    )
    looks = dataset is not None and looks_at_images(how, how.method)
    sets = (identify(dataset.train), identify(dataset.select)) if dataset is not None and looks else ()
    files = LearnFiles(out.with_name(f"{out.name}.learning"), resume, log_dir)
    masks = choose_masks(module, provenance, how, out, dataset, sets, init=init, files=files, device=device)
    if not is_main_process():
        return
    if report is not None:
        write_json(report, masks_values(masks, out.parent))
    print(
        f"{out}: {masks.pattern} masks ({masks.method}) for {len(masks.masked)} layers; {len(masks.dense)} stay dense"
    )


def bake(
    model: options.Model,
    masks: Annotated[Path, typer.Option(help="Mask file.")],
    out: options.Out = Path("sparse.safetensors"),
    weights: options.Weights = "auto",
    recalibrate: Annotated[
        Path | None, typer.Option(help="Data folder whose train/ images recalibrate BatchNorm statistics.")
    ] = None,
    classes: options.Classes = None,
    seed: options.Seed = 0,
    recipe: options.RecipeFile = None,
) -> None:
    """Set what the masks drop to zero and write the pruned checkpoint; the weights may be newer than the masks."""
    from maskplan.pipeline.data.dataset import identify
    from maskplan.pipeline.models.batchnorm import recalibrate as recalibrate_stage
    from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
    from maskplan.pipeline.models.state_dict import fit_weights, read_weights
    from maskplan.pipeline.pruning.bake import bake as bake_stage
    from maskplan.pipeline.pruning.mask import given_masks
    from maskplan.pipeline.recipe import read_recipe

    chosen = read_recipe(recipe, seed)
    module, provenance = open_checkpoint(ModelOptions(model, weights, classes, seed))
    dataset = _dataset(model, recalibrate, provenance.labels, provenance.classes, seed) if recalibrate else None
    mask_set = given_masks(module, provenance, masks)
    if dataset is None:
        baked = bake_stage(module, provenance, mask_set, out)
    else:
        with tempfile.TemporaryDirectory(prefix="maskplan-") as folder:
            baked = bake_stage(module, provenance, mask_set, Path(folder) / out.name)
            fit_weights(module, read_weights(baked.path), where=baked.path)
        used = (identify(dataset.train),)
        baked = recalibrate_stage(module, baked.provenance, dataset.train, chosen.recalibrate, out, used)
    print(f"{baked.path}: {mask_set.pattern} on {len(mask_set.masked)} layers, {baked.bytes:,} bytes")


def export(
    model: options.Model,
    out: options.Out = Path("model.onnx"),
    weights: options.Weights = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or fp16.")] = "fp32",
    classes: options.Classes = None,
    seed: options.Seed = 0,
    recipe: options.RecipeFile = None,
) -> None:
    """Export MODEL to ONNX, checked against PyTorch's own outputs."""
    from maskplan.exporters.onnx_export import PRECISIONS, export_onnx
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
    from maskplan.pipeline.recipe import read_recipe

    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}", fix=f"choose {' or '.join(PRECISIONS)}")
    chosen = read_recipe(recipe, seed)
    module, provenance = open_checkpoint(ModelOptions(model, weights, classes, seed))
    (written,) = export_onnx(module, provenance, chosen.export, {precision: out})
    print(f"{written.path}: {written.precision}, {written.bytes:,} bytes")


def _dataset(model: str, folder: Path | None, labels: tuple[str, ...], outputs: int, seed: int) -> Dataset | None:
    from maskplan.pipeline.data.dataset import open_folder
    from maskplan.pipeline.models.registry import BUNDLED

    if folder is not None:
        return open_folder(folder, labels, outputs, seed)
    if model == BUNDLED and outputs == 10:
        from maskplan.pipeline.data.digits import load_digits

        return load_digits()
    return None
