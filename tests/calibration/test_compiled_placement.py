"""NVIDIA's compiler finds an integer kernel for every layer that we quantize, and computes each pooling once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from tensorrt_hosts import NEEDS_RTX

from maskplan.calibration.placement import PlaceOptions, place
from maskplan.calibration.qdq import insert_qdq
from maskplan.engines.trt.compile import compile_onnx
from maskplan.exporters.metadata import describe_onnx
from maskplan.exporters.precision import to_fp16
from maskplan.pipeline.core.choices import DEQUANTIZE

pytestmark = NEEDS_RTX

POOLS = {"MaxPool": "maxpool", "AveragePool": "avgpool"}


@pytest.mark.parametrize(
    ("name", "quantize_outputs"),
    [
        ("resnet18", False),
        pytest.param("vgg", False, marks=pytest.mark.slow),
        pytest.param("shufflenet_v2", False, marks=pytest.mark.slow),
        pytest.param("mobilenet_v3_small", False, marks=pytest.mark.slow),
        pytest.param("densenet", True, marks=pytest.mark.slow),
    ],
)
def test_every_quantized_layer_is_an_integer_product(
    families: Any, name: str, quantize_outputs: bool, tmp_path: Path
) -> None:
    family = families(name)
    placement = place(family.model, PlaceOptions(quantize_outputs=quantize_outputs))
    path = tmp_path / "net.onnx"
    onnx.save(to_fp16(insert_qdq(family.model, placement, family.amax)), path)
    result = compile_onnx(describe_onnx(path)).result
    assert result.accepted, result.problems
    (profile,) = result.profiles
    assert profile.products == {"Int8": len(placement.weights)}
    assert DEQUANTIZE not in profile.roles
    for op, kind in POOLS.items():
        assert profile.kinds.get(kind, 0) == sum(node.op_type == op for node in family.model.graph.node)
