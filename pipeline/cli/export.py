"""`maskplan export`: a PyTorch model to an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import choice, patterns
from maskplan.pipeline.core.choices import FP32, FloatPrecision
from maskplan.pipeline.core.terminal import print_line

_EXAMPLES = """
maskplan export resnet50 --weights sparse.safetensors -o sparse.onnx
maskplan export resnet50 --weights sparse.safetensors --precision fp16 -o sparse.fp16.onnx
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    add_command(app, export, _EXAMPLES)


def export(
    model: options.Model,
    out: options.Out = Path("model.onnx"),
    weights: options.Weights = "auto",
    ema: options.Ema = None,
    fuse: options.Fuse = False,
    outputs: options.Outputs = None,
    precision: Annotated[
        FloatPrecision, choice(FloatPrecision, "precision", help="Precision of the weights and activations.")
    ] = FP32,
    classes: options.Classes = None,
    seed: options.Seed = 0,
    recipe: options.RecipeFile = None,
) -> None:
    """Export MODEL to ONNX and compare its outputs with PyTorch's."""
    from maskplan.exporters.onnx_export import export_onnx
    from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
    from maskplan.pipeline.recipe import read_recipe

    settings = read_recipe(recipe, seed)
    kinds = patterns(outputs) or settings.model.outputs
    module, provenance = open_checkpoint(ModelOptions(model, weights, classes, seed, ema, fuse, kinds))
    (onnx_model,) = export_onnx(module, provenance, settings.export, {precision: out})
    print_line(f"{onnx_model.path}: {onnx_model.precision}, {onnx_model.bytes:,} bytes")
