"""NVIDIA's compiler takes what we write for every family, in FP32, FP16 and INT8, and computes in that type."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from families import FAMILIES, traced_family
from tensorrt_hosts import NEEDS_RTX

from maskplan.calibration.placement import place
from maskplan.calibration.qdq import insert_qdq
from maskplan.engines.trt.compile import compile_onnx
from maskplan.exporters.metadata import describe_onnx
from maskplan.exporters.precision import to_fp16
from maskplan.pipeline.core.choices import FP16, FP32, INT8, NO_KERNEL, OnnxPrecision
from maskplan.pipeline.core.compilation import CompiledProfile

pytestmark = NEEDS_RTX

TYPES = {FP32: "Float", FP16: "Half", INT8: "Int8"}


def written(model: onnx.ModelProto, precision: OnnxPrecision) -> tuple[onnx.ModelProto, int]:
    """Our file of a precision, INT8 with FP16 elsewhere, and how many layers are INT8 in it."""
    if precision != INT8:
        return (to_fp16(model) if precision == FP16 else model), 0
    placement = place(model)
    # Where types change does not depend on the ranges.
    ranges = {activation.tensor: 1.0 for activation in placement.activations}
    return to_fp16(insert_qdq(model, placement, ranges)), len(placement.weights)


def compiled(model: onnx.ModelProto, precision: OnnxPrecision, folder: Path) -> CompiledProfile:
    made, int8_layers = written(model, precision)
    path = folder / f"{precision}.onnx"
    onnx.save(made, path)
    result = compile_onnx(describe_onnx(path)).result
    assert result.accepted, result.problems
    assert result.unread_lines == ()
    (profile,) = result.profiles
    if precision == INT8:
        assert profile.products["Int8"] == int8_layers, profile.products
    else:
        assert set(profile.products) <= {TYPES[precision], "Float"}, profile.products
    return profile


def compile_family(name: str, folder: Path) -> None:
    model = traced_family(name)
    kernels = {
        precision: [layer for layer in compiled(model, precision, folder).layers if layer.role != NO_KERNEL]
        for precision in TYPES
    }
    # Each integer product is followed by a kernel that scales its sums, which floats are spared.
    assert len(kernels[FP16]) <= len(kernels[INT8])


def test_the_smallest_family_compiles(tmp_path: Path) -> None:
    compile_family("squeezenet1_1", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_compiles(name: str, tmp_path: Path) -> None:
    compile_family(name, tmp_path)
