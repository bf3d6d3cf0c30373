"""Convert one ONNX file with other tools, in their environment; `compiled_placement.py` starts it.

    python benchmarks/performance/other_tools.py model.onnx images.npy FOLDER

writes a file for each tool to FOLDER and prints, as JSON, the versions and why a tool failed. It imports nothing of
maskplan, whose dependencies differ from ModelOpt's.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

Images = npt.NDArray[np.float32]
INPUT = "input"


class _Reader:
    """Images one at a time, as ONNX Runtime's calibrator asks for them."""

    def __init__(self, images: Images) -> None:
        self._images = images
        self.rewind()

    def get_next(self) -> dict[str, Images] | None:
        return next(self._feeds, None)

    def rewind(self) -> None:
        self._feeds: Iterator[dict[str, Images]] = ({INPUT: image[None]} for image in self._images)


def onnxruntime_default(model: Path, images: Images, out: Path) -> None:
    """ONNX Runtime's quantizer, symmetric and per channel, with its default choice of operators."""
    _onnxruntime(model, images, out, None, {})


def onnxruntime_tensorrt(model: Path, images: Images, out: Path) -> None:
    """The same with the options that its documentation names for TensorRT: biases stay float, one pair for each reader."""
    extra = {"AddQDQPairToWeight": True, "DedicatedQDQPair": True, "QuantizeBias": False}
    products = ["Conv", "MatMul", "Gemm"]
    extra["OpTypesToExcludeOutputQuantization"] = [*products, "Add"]
    _onnxruntime(model, images, out, [*products, "Add", "MaxPool", "GlobalAveragePool"], extra)


def _onnxruntime(model: Path, images: Images, out: Path, ops: list[str] | None, extra: dict[str, Any]) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        prepared = f"{folder}/prepared.onnx"
        quant_pre_process(str(model), prepared)
        quantize_static(
            prepared,
            str(out),
            _Reader(images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=ops,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, **extra},
        )


def modelopt_int8_fp32(model: Path, images: Images, out: Path) -> None:
    """ModelOpt's INT8 with FP32 elsewhere, ranges by the largest magnitude."""
    _modelopt(model, images, out, "fp32")


def modelopt_int8_fp16(model: Path, images: Images, out: Path) -> None:
    """ModelOpt's INT8 with FP16 elsewhere."""
    _modelopt(model, images, out, "fp16")


def _modelopt(model: Path, images: Images, out: Path, elsewhere: str) -> None:
    from modelopt.onnx.quantization import quantize

    quantize(
        str(model),
        quantize_mode="int8",
        calibration_data={INPUT: images},
        calibration_method="max",
        calibration_eps=["cpu"],
        output_path=str(out),
        high_precision_dtype=elsewhere,
        log_level="ERROR",
    )


def onnxconverter_fp16(model: Path, images: Images, out: Path) -> None:
    """onnxconverter-common's FP16; inputs and outputs stay FP32."""
    from onnxconverter_common import float16

    onnx.save(float16.convert_float_to_float16(onnx.load(model), keep_io_types=True), out)


def modelopt_fp16(model: Path, images: Images, out: Path) -> None:
    """ModelOpt's FP16 (AutoCast); inputs and outputs stay FP32."""
    from modelopt.onnx.autocast import convert_to_mixed_precision

    onnx.save(convert_to_mixed_precision(str(model), keep_io_types=True), out)


# ModelOpt changes ONNX Runtime's quantizer when it is imported, so it comes last.
TOOLS: tuple[Callable[[Path, Images, Path], None], ...] = (
    onnxruntime_default,
    onnxruntime_tensorrt,
    onnxconverter_fp16,
    modelopt_fp16,
    modelopt_int8_fp32,
    modelopt_int8_fp16,
)


def main() -> None:
    """Convert one file with all tools."""
    model, images, folder = map(Path, sys.argv[1:])
    failed, found = {}, {}
    for tool in TOOLS:
        try:
            tool(model, np.load(images), folder / f"{tool.__name__}.onnx")
        except Exception as error:  # whatever another tool raises is its answer
            failed[tool.__name__] = f"{type(error).__name__}: {error}"
    for name in ("nvidia-modelopt", "onnxruntime", "onnxconverter-common", "onnx", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    print(json.dumps({"failed": failed, "versions": found}))


if __name__ == "__main__":
    main()
