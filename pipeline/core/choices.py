"""Every closed set of choices as a type, so that mypy finds a branch that misses one."""

from __future__ import annotations

from typing import Final, Literal

FloatPrecision = Literal["fp32", "fp16"]
Precision = Literal["fp32", "fp16", "int8"]
"""Precision of a model; layers of an INT8 model that are not quantized run in one of the other two."""

OnnxPrecision = Literal["fp32", "fp16", "bf16", "int8"]
"""Precision of an ONNX file of any tool, and of an engine built from it."""

FP32: Final = "fp32"
FP16: Final = "fp16"
BF16: Final = "bf16"
INT8: Final = "int8"

Backend = Literal["tensorrt", "tensorrt-rtx", "onnxruntime"]

TENSORRT: Final = "tensorrt"
TENSORRT_RTX: Final = "tensorrt-rtx"
ONNXRUNTIME: Final = "onnxruntime"

GPU_BACKENDS: Final[frozenset[Backend]] = frozenset({TENSORRT, TENSORRT_RTX})
"""Backends whose engines are plans: they run on a GPU only, and accept the batch sizes of their profiles only."""

SparseFlagEffect = Literal["same_bytes", "same_content", "other_bytes"]
"""Whether a plan differs from a build without the sparse flag; `same_content`: in the compiler's own numbering only."""

SAME_BYTES: Final = "same_bytes"
SAME_CONTENT: Final = "same_content"
OTHER_BYTES: Final = "other_bytes"

GateVerdict = Literal["pass", "fail", "not_applicable"]

PASS: Final = "pass"
FAIL: Final = "fail"
NOT_APPLICABLE: Final = "not_applicable"

CheckVerdict = Literal["pass", "fail", "unknown"]
"""Result of the 2:4 check; `unknown` if there are weights that it cannot read, or none at all."""

WeightState = Literal["conforming", "violating", "dense_by_choice", "ineligible", "unknown"]
"""What the 2:4 check found for one weight."""

CONFORMING: Final = "conforming"
VIOLATING: Final = "violating"
DENSE_BY_CHOICE: Final = "dense_by_choice"
INELIGIBLE: Final = "ineligible"

LayerState = Literal["sparse", "dense", "unknown"]
"""How an engine runs a layer, as far as the runtime shows it."""

SPARSE: Final = "sparse"
DENSE: Final = "dense"
UNKNOWN: Final = "unknown"

CompileMode = Literal["auto", "required", "off"]
"""Whether the line compiles its ONNX files with NVIDIA's compiler: where it is installed, in any case, or not at all."""

REQUIRED: Final = "required"
OFF: Final = "off"

LayerRole = Literal["product", "quantize", "dequantize", "cast", "reformat", "other", "no_kernel"]
"""What a layer of a compiled engine does, as far as the compiler shows it; `engines/trt/layers.py` has the rules."""

PRODUCT: Final = "product"
QUANTIZE: Final = "quantize"
DEQUANTIZE: Final = "dequantize"
CAST: Final = "cast"
REFORMAT: Final = "reformat"
OTHER: Final = "other"
NO_KERNEL: Final = "no_kernel"

CONVERSIONS: Final[frozenset[LayerRole]] = frozenset({QUANTIZE, DEQUANTIZE, CAST, REFORMAT})
"""Roles of kernels of their own whose work could be part of another kernel: they only change types or formats."""

Layout = Literal["channel", "flat"]
"""Which axis the groups of a convolution's weight run along: the input channels, or the flattened C*R*S axis."""

CHANNEL: Final = "channel"
FLAT: Final = "flat"

OutputType = Literal["logits", "values"]
"""What an output of a network holds: scores of classes, of which the largest counts, or values."""

LOGITS: Final = "logits"
VALUES: Final = "values"

MaskMethod = Literal["learned", "magnitude", "layerwise", "transposable", "danhofer2024"]

LEARNED: Final = "learned"
MAGNITUDE: Final = "magnitude"
LAYERWISE: Final = "layerwise"
TRANSPOSABLE: Final = "transposable"
DANHOFER2024: Final = "danhofer2024"

AUTO: Final = "auto"
