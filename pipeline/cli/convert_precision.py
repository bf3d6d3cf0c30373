"""`maskplan convert-precision`: an FP32 ONNX file of any tool to FP16, compared with the FP32 file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.exit_codes import GateError
from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import choice, override, parse_shapes, patterns, write_report
from maskplan.pipeline.core.choices import FP16, FloatPrecision

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from maskplan.exporters.convert_precision import ConversionReport

_EXAMPLES = """
maskplan convert-precision model.onnx -o model.fp16.onnx
maskplan convert-precision model.onnx --data imagenet --keep-fp32 '/head/*'
maskplan convert-precision detector.onnx --shape images:1x3x640x640 --report fp16.json
"""
_MAX_SHOWN = 20


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    add_command(app, convert_precision, _EXAMPLES, _defaults, name="convert-precision")


def _defaults() -> dict[str, object]:
    from maskplan.exporters.convert_precision import ConvertOptions

    return vars(ConvertOptions())


def convert_precision(
    model: Annotated[Path, typer.Argument(help="An FP32 ONNX file, written by any tool.", show_default=False)],
    precision: Annotated[FloatPrecision, choice(FloatPrecision, "precision", help="Must be fp16.")] = FP16,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="The FP16 file; by default MODEL.fp16.onnx.")
    ] = None,
    keep_fp32: options.KeepFp32 = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Compare on images of train/ in this folder; by default on random numbers."),
    ] = None,
    mean: options.Mean = None,
    std: options.Std = None,
    images: Annotated[int | None, typer.Option(min=1, help="Samples to compare on.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest difference of an output, relative to its largest value in FP32."),
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Smallest share of equal elements of an integer output.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:1x3x224x224", help="Shape of an input with dynamic sizes. Repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random samples and of the choice of images.")] = 0,
    report: options.Report = None,
) -> None:
    """Convert an ONNX file to FP16. What FP16 cannot represent stays FP32.

    The file is written only if its outputs are close to those of the FP32 file; otherwise the exit code is 1. Both are
    compared on images or random samples, and on a black image, a white one and one with a single pixel.
    """
    from maskplan.exporters.convert_precision import ConvertOptions
    from maskplan.exporters.convert_precision import convert_precision as convert_file
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.core.serialization import encode

    if precision != FP16:
        raise InputError("the file is already FP32", found=f"--precision {precision}", fix="give --precision fp16")
    target = out or model.with_name(f"{model.stem}.fp16.onnx")
    if target.resolve() == model.resolve():
        raise InputError("the FP16 file would overwrite the model", where=target, fix="give another -o")
    if data is None and (mean is not None or std is not None):
        raise InputError("--mean and --std are for images", fix="give --data, or remove them")
    convert_options = override(
        ConvertOptions(seed=seed, shapes=parse_shapes(shape)),
        keep_fp32=patterns(keep_fp32),
        tolerance=tolerance,
        min_agreement=min_agreement,
        images=images,
    )
    batches = None if data is None else _images(model, data, mean, std, convert_options.images, seed)
    result = convert_file(model, target, convert_options, batches)
    write_report(report, encode(result))
    _show(result)
    if not result.passed:
        raise GateError(f"{target} was not written: {'; '.join(result.problems)}")
    print(f"{target}: fp16, {target.stat().st_size:,} bytes")


def _images(
    model: Path, data: Path, mean: str | None, std: str | None, count: int, seed: int
) -> Iterable[npt.NDArray[np.float32]]:
    from maskplan.calibration.batches import calibration_batches, choose_images
    from maskplan.pipeline.cli.calibrate import calibration_images

    source = calibration_images(model, data, mean, std, seed, needs_classes=False)
    return calibration_batches(choose_images(source.train, count, seed), source.preprocessing, 4)


def _show(result: ConversionReport) -> None:
    for change in result.changed:
        print(f"  {change}")
    if result.in_fp32:
        print(f"{len(result.in_fp32)} nodes stay FP32:")
    for name, reason in list(result.in_fp32.items())[:_MAX_SHOWN]:
        print(f"  {name}: {reason}")
    if len(result.in_fp32) > _MAX_SHOWN:
        print(f"  and {len(result.in_fp32) - _MAX_SHOWN} more; --report lists all")
    print(f"compared on {result.samples} samples ({result.inputs}, and 3 constant ones):")
    for output in result.outputs:
        print(
            f"  {output.name}: largest difference {output.difference:.2g}, {output.agreement:.1%} of shapes and integers"
        )
