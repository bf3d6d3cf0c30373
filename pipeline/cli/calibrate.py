"""`calibrate`: an FP32 ONNX file to INT8 with explicit Q/DQ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.gates import GateError

if TYPE_CHECKING:
    from maskplan.calibration.calibrate import CalibrationImages
    from maskplan.pipeline.core.reports import CalibrationReport

_EXAMPLES = """Examples:\n
  maskplan calibrate build/r50/sparse.onnx --data imagenet -o sparse.int8.onnx\n
  maskplan calibrate sparse.onnx --data imagenet --float-dtype fp16 --quantize-outputs -o for_tensorrt.onnx\n
  maskplan calibrate sparse.onnx --data imagenet --max-drop 0.5 --cache ranges.json
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(epilog=_EXAMPLES)(calibrate)


def calibrate(
    model: Annotated[Path, typer.Argument(help="An FP32 ONNX file of any tool.", show_default=False)],
    data: options.Data = None,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="The INT8 file; MODEL.int8.onnx by default.")
    ] = None,
    float_dtype: Annotated[
        str, typer.Option(help="What stays in floats: fp32 for ONNX Runtime, fp16 for TensorRT.")
    ] = "fp32",
    images: Annotated[int, typer.Option(min=1, help="Training images to measure ranges on.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 16,
    method: Annotated[str, typer.Option(help="minmax, percentile, entropy or mse.")] = "mse",
    percentile: Annotated[float, typer.Option(help="With --method percentile.")] = 99.99,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Pattern of node or weight names to leave in floats; repeatable.")
    ] = None,
    quantize_outputs: Annotated[
        bool, typer.Option(help="Quantize what layers hand on too, for INT8-in/INT8-out kernels.")
    ] = False,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Points of top-1 it may cost on images set aside; the worst layers stay in floats until then."
        ),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Ranges (JSON): taken if there, else written.")] = None,
    import_trt_cache: Annotated[
        Path | None, typer.Option(help="Take the ranges of TensorRT's text cache; needs no images.")
    ] = None,
    export_trt_cache: Annotated[Path | None, typer.Option(help="Write the ranges as TensorRT's text cache.")] = None,
    mean: Annotated[str | None, typer.Option(help="For a foreign ONNX file: mean a channel.")] = None,
    std: Annotated[str | None, typer.Option(help="For a foreign ONNX file: deviation a channel.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw of images, and of the part set aside.")] = 0,
    report: options.Report = None,
) -> None:
    """Quantize an ONNX file to INT8 with explicit Q/DQ, so that weights that are 2:4 stay so; exit code 1 if they do not."""
    from maskplan.calibration.cache import read_tensorrt_cache, write_tensorrt_cache
    from maskplan.calibration.calibrate import CalibrateOptions
    from maskplan.calibration.calibrate import calibrate as calibrate_stage
    from maskplan.exporters.conformance import CheckOptions, check_2to4
    from maskplan.exporters.metadata import describe_onnx
    from maskplan.pipeline.core.choices import FP16, FP32
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.core.files import write_json
    from maskplan.pipeline.core.serialization import encode

    if float_dtype not in (FP32, FP16):
        raise InputError(f"unknown --float-dtype {float_dtype!r}", fix="choose fp32 or fp16")
    target = out or model.with_name(f"{model.stem}.int8.onnx")
    if target.resolve() == model.resolve():
        raise InputError("the INT8 file would take the model's place", where=target, fix="give another -o")
    if import_trt_cache is not None and cache is not None:
        raise InputError("--cache and --import-trt-cache both give ranges", fix="leave one of them out")
    how = CalibrateOptions(images, batch, method, percentile, tuple(exclude or ()), quantize_outputs, max_drop, seed)
    described = describe_onnx(model)
    source: CalibrationImages | dict[str, float]
    if import_trt_cache is not None:
        source = read_tensorrt_cache(import_trt_cache)[1]
    else:
        source = calibration_images(model, data, mean, std, seed)
    done = calibrate_stage(described, source, how, {float_dtype: target}, cache)
    if export_trt_cache is not None:
        write_tensorrt_cache(export_trt_cache, done.amax)
    if report is not None:
        write_json(report, encode(done.report))
    left = f", {len(done.report.in_float)} in {float_dtype}" if done.report.in_float else ""
    print(f"{target}: {done.report.quantized_layers} layers in INT8{left}; ranges by {_origin(done.report)}")
    for name, why in done.report.in_float:
        print(f"  {name}: {why}")
    if done.report.select_drop is not None:
        print(f"drop of top-1: {done.report.select_drop:+.2f} points on {done.report.select_images} images set aside")
    made = described.provenance
    if made is not None and made.masked:
        verdict = check_2to4(target, CheckOptions(pattern=made.pattern or "2:4"))
        print(f"conformance {verdict.verdict}: {verdict.conforming} of {verdict.eligible} eligible weights")
        if not verdict.passed:
            raise GateError(f"{target}: {verdict.reason}")


def calibration_images(
    model: Path, data: Path | None, mean: str | None, std: str | None, seed: int
) -> CalibrationImages:
    """Images for an ONNX file, prepared as its record or the options say.

    Raises:
        InputError: There are none, or they do not fit the model.
    """
    from maskplan.calibration.calibrate import CalibrationImages
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.data.dataset import open_folder
    from maskplan.pipeline.data.digits import load_digits
    from maskplan.pipeline.models.registry import BUNDLED
    from maskplan.pipeline.parity.sides import open_side, shared_preprocessing

    with open_side(model) as side:
        prepared = shared_preprocessing([side], mean, std)
        made, classes = side.provenance, side.classes
    if data is not None:
        found = open_folder(data, made.labels if made else (), classes, seed)
    elif made is not None and made.model == BUNDLED and classes == 10:
        found = load_digits()
    else:
        raise InputError(
            "no images to calibrate on",
            where=model,
            fix="give --data DIR with train/ and val/, or --import-trt-cache FILE",
        )
    return CalibrationImages(found.train, found.select, prepared)


def _origin(report: CalibrationReport) -> str:
    if report.images and report.ranges_from == "images":
        return f"{report.method} on {report.images} images"
    return "TensorRT's cache" if report.ranges_from == "imported" else "the cache"
