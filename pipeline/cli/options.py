"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        help="A torchvision name (resnet50), timm/NAME, path/to/file.py:factory, or digits_resnet.",
        show_default=False,
    ),
]
Weights = Annotated[str, typer.Option(help="auto, pretrained, random, or a .safetensors or .pth file.")]
Classes = Annotated[int | None, typer.Option(help="Number of classes, where it is not the model's own.")]
Data = Annotated[
    Path | None,
    typer.Option(help="Folder with train/CLASS/* and val/CLASS/*; digits_resnet has its own images."),
]
Seed = Annotated[int, typer.Option(help="Seed of random weights, of learning, and of the select part.")]
Device = Annotated[str, typer.Option(help="Where masks are learned: auto, cpu or cuda.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="TOML file with options of the stages.")]
Report = Annotated[Path | None, typer.Option(help="Write the verdict as JSON.")]
Out = Annotated[Path, typer.Option("--output", "-o", help="File to write.")]
