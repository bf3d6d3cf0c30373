"""Options that several commands share, and the way from command-line values to options records.

An option whose default is in an options record is None where it is not given: the record, or the recipe, decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import typer

from maskplan.pipeline.core.choices import Backend, MaskMethod

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from maskplan.pipeline.data.samples import ImageOptions

    Record = TypeVar("Record", bound=DataclassInstance)

BackendChoice = Literal["auto", Backend]
MethodChoice = Literal["auto", MaskMethod]


def choice(choices: Any, name: str, *, help: str, **settings: Any) -> Any:
    """A `typer.Option` whose values are those of a Literal type.

    An unknown value is bad input (exit code 3) in every command, as it is in a recipe.

    Args:
        choices: The Literal type.
        name: What the value is called in the message: "unknown NAME 'value'".
        help: Text of the help page.
        settings: Passed on to `typer.Option`.
    """
    values: tuple[str, ...] = get_args(choices)

    def parse(text: str) -> str:
        if text not in values:
            from maskplan.pipeline.core.errors import InputError

            raise InputError(f"unknown {name} {text!r}", fix=f"choose one of {', '.join(values)}")
        return text

    return typer.Option(parser=parse, help=help, **{"metavar": "|".join(values), **settings})


def override(record: Record, **given: object) -> Record:
    """The record with the values given on the command line in place of its own; None keeps the record's."""
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(record, **changes)


def patterns(given: Sequence[str] | None) -> tuple[str, ...] | None:
    """Values of a repeatable option as a record holds them; None if the option was not given."""
    return tuple(given) if given else None


def parse_batch_sizes(text: str | None, example: str = "--batch 1,8,32") -> tuple[int, ...] | None:
    """`"1,8,32"` to `(1, 8, 32)`; None stays None. The example is for the message.

    Raises:
        InputError: Not a list of positive integers.
    """
    if text is None:
        return None
    from maskplan.pipeline.core.errors import InputError

    sizes = [part.strip() for part in text.split(",")]
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        what = "batch sizes" if "--batch" in example else "numbers"
        raise InputError(f"not a list of {what}", found=repr(text), fix=f"write for example {example}")
    return tuple(map(int, sizes))


def parse_shapes(given: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    """`["input:1x3x224x224"]` to `{"input": (1, 3, 224, 224)}`.

    Raises:
        InputError: Not a name with positive sizes.
    """
    from maskplan.pipeline.core.errors import InputError

    shapes = {}
    for text in given or ():
        name, _, sizes = text.rpartition(":")
        parts = sizes.split("x")
        if not name or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise InputError("not a shape", found=repr(text), fix="write for example --shape input:1x3x224x224")
        shapes[name] = tuple(map(int, parts))
    return shapes


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """`"3x224x224"` to `(3, 224, 224)`; None stays None.

    Raises:
        InputError: Not positive integers separated by x.
    """
    if text is None:
        return None
    from maskplan.pipeline.core.errors import InputError

    sizes = text.lower().split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        fix = "write the size of one input without the batch, for example --shape 3x224x224; batches have their own option"
        raise InputError("not a shape", found=repr(text), fix=fix)
    return tuple(map(int, sizes))


def image_options(shape: str | None, mean: str | None, std: str | None) -> ImageOptions:
    """How image files become an input, by `--shape`, `--mean` and `--std`.

    Raises:
        InputError: Not numbers.
    """
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.data.samples import ImageOptions

    def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
        if text is None:
            return None
        try:
            return tuple(float(part) for part in text.split(","))
        except ValueError as error:
            what, fix = "expected one number per channel", f"write for example {option} 0.5,0.5,0.5"
            raise InputError(what, where=option, found=repr(text), fix=fix) from error

    return ImageOptions(parse_shape(shape), numbers(mean, "--mean"), numbers(std, "--std"))


def write_report(path: Path | None, values: object) -> None:
    """Write the JSON values of `--report FILE`, if it was given."""
    from maskplan.pipeline.core.files import write_json

    if path is not None:
        write_json(path, values, option="--report")


Model = Annotated[
    str,
    typer.Argument(
        help="A torchvision model (resnet50), timm/NAME, path/to/file.py:factory, or digits_resnet.",
        show_default=False,
    ),
]
OnnxFile = Annotated[Path, typer.Argument(help="An ONNX file, written by any tool.", show_default=False)]
Weights = Annotated[str, typer.Option(help="auto, pretrained, random, or a .safetensors or .pth file.")]
Ema = Annotated[
    bool | None,
    typer.Option(
        "--ema/--no-ema",
        help="Take the averaged weights (EMA, SWA) of the file, or its raw ones; by default raw ones, if there are any.",
        show_default=False,
    ),
]
Fuse = Annotated[
    bool, typer.Option("--fuse", help="First fuse the training branches of the model's blocks (RepVGG, MobileOne).")
]
Outputs = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME:KIND[:AXIS]",
        help="What an output holds, if not what its shape suggests: logits, with the axis of the classes (1 by default), or "
        "values. Repeatable.",
        show_default=False,
    ),
]
Classes = Annotated[int | None, typer.Option(help="Number of classes, if not the model's own.")]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Folder with train/CLASS/* and val/CLASS/*; where no classes are needed, any folder of images. "
        "digits_resnet has its own images."
    ),
]
Images = Annotated[
    int | None,
    typer.Option(
        min=16,
        help="Use at most this many images of the training part, for everything; up to 8192, masks are learned in the "
        "setting for few images.",
    ),
]
SyntheticImages = Annotated[
    int | None,
    typer.Option(
        min=16,
        help="Without --data: choose masks and statistics by this many images that are made from the network's BatchNorm "
        "statistics.",
    ),
]
Pattern = Annotated[str | None, typer.Option(help="N:M, at most N non-zeros in each group of M.")]
IncludeLinear = Annotated[bool | None, typer.Option(help="Include linear layers.")]
Layers = Annotated[
    list[str] | None,
    typer.Option(help="Only weights whose name matches this pattern, such as 'layer3.*'. Repeatable."),
]
MinChannels = Annotated[int | None, typer.Option(help="Skip convolutions with fewer input channels.")]
BackendOption = Annotated[BackendChoice, choice(BackendChoice, "backend", help="Runtime of the engine.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random: weights, learning, the choice of images.")]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Device that PyTorch computes on.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="TOML file with options of the stages.")]
Report = Annotated[Path | None, typer.Option(help="Write the result as JSON to this file.")]
Out = Annotated[Path, typer.Option("--output", "-o", help="File to write.")]
KeepFp32 = Annotated[
    list[str] | None,
    typer.Option(help="Pattern of names of nodes or tensors that stay FP32 in an FP16 file. Repeatable."),
]
Shape = Annotated[
    str | None,
    typer.Option(metavar="CxHxW", help="Size of one image without the batch, where the model's own is dynamic."),
]
Mean = Annotated[
    str | None, typer.Option(help="For an ONNX file of another tool: mean of each channel, such as 0.5,0.5,0.5.")
]
Std = Annotated[str | None, typer.Option(help="For an ONNX file of another tool: standard deviation of each channel.")]
THRESHOLDS = "Thresholds"
"""Panel of the gate's limits on a help page."""
MaxTop1Drop = Annotated[
    float | None,
    typer.Option(help="Percentage points of top-1 accuracy that may be lost.", rich_help_panel=THRESHOLDS),
]
MinSqnr = Annotated[
    float | None,
    typer.Option(
        help="Smallest signal to noise ratio of any output, in dB; for networks that are not classifiers.",
        rich_help_panel=THRESHOLDS,
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.py:FUNCTION",
        help="Your own metric, called with outputs and targets by name; one number for each sample or for all, higher "
        "is better.",
        rich_help_panel=THRESHOLDS,
    ),
]
MaxMetricDrop = Annotated[float | None, typer.Option(help="How much --metric may drop.", rich_help_panel=THRESHOLDS)]
MinAgreement = Annotated[
    float | None,
    typer.Option(help="Percent of images on which both must predict the same class.", rich_help_panel=THRESHOLDS),
]
UseCi = Annotated[
    bool | None,
    typer.Option(
        "--use-ci/--use-point",
        help="Judge the worse end of the 95% confidence interval, or the point estimate.",
        rich_help_panel=THRESHOLDS,
    ),
]
