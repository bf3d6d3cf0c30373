"""`maskplan calibrate`: an FP32 ONNX file to INT8 with explicit Q/DQ nodes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.exit_codes import GateError
from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import choice, image_options, override, parse_shape, patterns, write_report
from maskplan.pipeline.core.choices import FP16, FP32, FloatPrecision
from maskplan.pipeline.core.terminal import print_line

if TYPE_CHECKING:
    from maskplan.calibration.calibrate import CalibrationImages, CalibrationSamples
    from maskplan.pipeline.core.reports import CalibrationReport

_EXAMPLES = """
maskplan calibrate build/r50/sparse.onnx --data imagenet -o sparse.int8.onnx
maskplan calibrate sparse.onnx --data imagenet --float-dtype fp16 --quantize-outputs -o for_tensorrt.onnx
maskplan calibrate sparse.onnx --data imagenet --max-drop 0.5 --cache ranges.json
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    add_command(app, calibrate, _EXAMPLES, _defaults)


def _defaults() -> dict[str, object]:
    from maskplan.calibration.calibrate import CalibrateOptions

    return vars(CalibrateOptions())


def calibrate(
    model: Annotated[Path, typer.Argument(help="An FP32 ONNX file, written by any tool.", show_default=False)],
    data: options.Data = None,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="The INT8 file; by default MODEL.int8.onnx.")
    ] = None,
    float_dtype: Annotated[
        FloatPrecision,
        choice(
            FloatPrecision,
            "--float-dtype",
            help="Type of the layers that are not quantized: fp32 for ONNX Runtime, fp16 for TensorRT.",
        ),
    ] = FP32,
    keep_fp32: options.KeepFp32 = None,
    images: Annotated[int | None, typer.Option(min=1, help="Training images to measure ranges on.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images per batch.")] = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="<method>", help="How ranges are chosen: minmax, percentile, entropy or mse."),
    ] = None,
    percentile: Annotated[float | None, typer.Option(help="For --method percentile.")] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of names of nodes or weights to keep in floating point. Repeatable."),
    ] = None,
    quantize_outputs: Annotated[
        bool | None, typer.Option(help="Also quantize the outputs of layers, for kernels with INT8 inputs and outputs.")
    ] = None,
    quantize_heads: Annotated[
        bool | None,
        typer.Option(
            "--quantize-heads/--no-quantize-heads",
            help="Also quantize the last layers before outputs that are no classes, such as boxes.",
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Percentage points of top-1 on held-out training images that INT8 may cost; the worst layers stay in "
            "floating point until this holds."
        ),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="JSON file of ranges: read if it exists, otherwise written.")
    ] = None,
    import_trt_cache: Annotated[
        Path | None, typer.Option(help="Take the ranges from a calibration cache of TensorRT; needs no images.")
    ] = None,
    export_trt_cache: Annotated[
        Path | None, typer.Option(help="Write the ranges as a calibration cache of TensorRT.")
    ] = None,
    shape: options.Shape = None,
    mean: options.Mean = None,
    std: options.Std = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of images.")] = 0,
    report: options.Report = None,
) -> None:
    """Quantize an ONNX file to INT8 with explicit Q/DQ nodes. 2:4 weights stay 2:4; exit code 1 if they do not."""
    from maskplan.calibration.cache import read_tensorrt_cache, write_tensorrt_cache
    from maskplan.calibration.calibrate import CalibrateOptions
    from maskplan.calibration.calibrate import calibrate as calibrate_onnx
    from maskplan.exporters.metadata import describe_onnx
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.core.serialization import encode

    target = out or model.with_name(f"{model.stem}.int8.onnx")
    if target.resolve() == model.resolve():
        raise InputError("the INT8 file would overwrite the model", where=target, fix="give another -o")
    if import_trt_cache is not None and cache is not None:
        raise InputError("--cache and --import-trt-cache both give ranges", fix="remove one of them")
    if keep_fp32 and float_dtype != FP16:
        raise InputError("--keep-fp32 without --float-dtype fp16", fix="add --float-dtype fp16, or remove --keep-fp32")
    calibrate_options = override(
        CalibrateOptions(seed=seed),
        images=images,
        batch=batch,
        method=method,
        percentile=percentile,
        exclude=patterns(exclude),
        keep_fp32=patterns(keep_fp32),
        quantize_outputs=quantize_outputs,
        quantize_heads=quantize_heads,
        max_drop=max_drop,
    )
    onnx_model = describe_onnx(model)
    source: CalibrationImages | CalibrationSamples | dict[str, float]
    if import_trt_cache is not None:
        source = read_tensorrt_cache(import_trt_cache)[1]
    else:
        source = calibration_source(model, data, mean, std, seed, shape)
    calibrated = calibrate_onnx(onnx_model, source, calibrate_options, {float_dtype: target}, cache)
    if export_trt_cache is not None:
        write_tensorrt_cache(export_trt_cache, calibrated.amax)
    write_report(report, encode(calibrated.report) | {"layers": [encode(layer) for layer in calibrated.layers]})
    _show(calibrated.report, target, float_dtype)
    for layer in calibrated.layers:
        if layer.reason is None:
            print_line(f"  {layer.node}: {layer.dtype} ({layer.op}, weight {layer.weight})")
    if onnx_model.provenance is not None and onnx_model.provenance.masked:
        _check(target, onnx_model.provenance.pattern)


def _show(report: CalibrationReport, target: Path, float_dtype: str) -> None:
    floats = f", {len(report.in_float)} in {float_dtype}" if report.in_float else ""
    print_line(f"{target}: {report.quantized_layers} layers in INT8{floats}; ranges by {_origin(report)}")
    for name, reason in report.in_float:
        print_line(f"  {name}: {reason}")
    if report.select_drop is not None:
        print_line(
            f"drop of top-1: {report.select_drop:+.2f} points on {report.select_images} held-out training images"
        )


def _origin(report: CalibrationReport) -> str:
    if report.images and report.ranges_from == "images":
        return f"{report.method} on {report.images} images"
    return "TensorRT's cache" if report.ranges_from == "imported" else "the cache"


def _check(int8_file: Path, pattern: str | None) -> None:
    """Check that quantization kept the pruned weights N:M."""
    from maskplan.exporters.conformance import CheckOptions, check_2to4

    conformance = check_2to4(int8_file, override(CheckOptions(), pattern=pattern))
    print_line(
        f"conformance {conformance.verdict}: {conformance.conforming} of {conformance.eligible} eligible weights"
    )
    if not conformance.passed:
        raise GateError(f"{int8_file}: {conformance.reason}")


def calibration_source(
    model: Path, data: Path | None, mean: str | None, std: str | None, seed: int, shape: str | None
) -> CalibrationImages | CalibrationSamples:
    """What an ONNX file of any kind is calibrated on: `train` of class folders for classifiers, else samples.

    Raises:
        InputError: There are no images, or they do not fit the model.
    """
    from dataclasses import replace

    from maskplan.calibration.calibrate import CalibrationSamples
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.data.samples import open_samples
    from maskplan.pipeline.parity.model_files import open_network

    with open_network(model) as network:
        inputs, provenance, classifies = network.engine.inputs, network.provenance, network.classifies_images
    has_classes = data is None or ((data / "train").is_dir() and any(p.is_dir() for p in (data / "train").iterdir()))
    if classifies and has_classes:
        return calibration_images(model, data, mean, std, seed, parse_shape(shape), has_option=True)
    if data is None:
        fix = "give --data, a folder of images or a .npz file with an array for each input, or --import-trt-cache FILE"
        raise InputError("no samples to calibrate on", where=model, fix=fix)
    images = image_options(shape, mean, std)
    if provenance is not None:
        images = replace(images, preprocessing=provenance.preprocessing)
    return CalibrationSamples(open_samples(data, "train", inputs, images, model.name))


def calibration_images(
    model: Path,
    data: Path | None,
    mean: str | None,
    std: str | None,
    seed: int,
    shape: tuple[int, ...] | None = None,
    *,
    has_option: bool = False,
    needs_classes: bool = True,
) -> CalibrationImages:
    """Images for an ONNX file, preprocessed as its record or the options say; `shape` fills in sizes that are dynamic.

    Labels choose the method of calibration; with `needs_classes=False`, any folder of images serves.

    Raises:
        InputError: There are no images, or they do not fit the model.
    """
    from maskplan.calibration.calibrate import CalibrationImages
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.data.source import find_dataset
    from maskplan.pipeline.parity.model_files import open_model, shared_preprocessing

    with open_model(model) as side:
        preprocessing = shared_preprocessing([side], mean, std, shape, has_option=has_option)
        provenance, outputs = side.provenance, side.classes
    dataset = find_dataset(
        data,
        model=provenance.model if provenance else None,
        labels=provenance.labels if provenance else (),
        outputs=outputs if needs_classes else 0,
        seed=seed,
    )
    if dataset is None:
        raise InputError(
            "no images to calibrate on",
            where=model,
            fix="give --data DIR with train/ and val/, or --import-trt-cache FILE",
        )
    return CalibrationImages(dataset.train, dataset.select, preprocessing)
