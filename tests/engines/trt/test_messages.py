"""Messages of TensorRT-RTX 1.7.1, as its log has them, in words for the user of the model."""

from __future__ import annotations

import pytest

from maskplan.engines.trt.messages import NO_PLUGIN, NOT_SUPPORTED, readable, way_out

NO_DRIVER = (
    "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at /_src/common/dispatch/"
    "checkMacros.cpp:250 (cudaError 35: CUDA driver version is insufficient for CUDA runtime version))"
)
TYPES = (
    "Invalid Node - layer.add\nITensor::getDimensions: Error Code 4: API Usage Error (layer.add: ElementWiseOperation SUM"
    " must have same input types. But they are of types Float and Half. In validateTypes at /_src/optimizer/common/nodes/"
    f"elementWiseNode.cpp:40)\n{NO_DRIVER}"
)


@pytest.mark.parametrize(
    ("text", "shown", "fix"),
    [
        (
            TYPES,
            "layer.add: ElementWiseOperation SUM must have same input types. But they are of types Float and Half.",
            "equal with a Cast",
        ),
        (
            'convertDtype(onnxDtype.elem_type(), &trtDtype) && "Failed to convert ONNX date type to TensorRT data type."',
            "an input or a tensor is of a type that the library does not know",
            "change the types",
        ),
        (
            "Assertion failed: creator && getPluginCreatorVersion(creator) == CreatorVersion::kV3ONE: NonZero plugin creator"
            " version 1 was not found in plugin registry.",
            "NonZero plugin creator version 1 was not found in plugin registry.",
            "other operators",
        ),
        (
            "(foreignNode) Converting conv activation scales to fp32.",
            "(foreignNode) Converting conv activation scales to fp32.",
            "onnx.checker",
        ),
        (NO_DRIVER, None, "onnx.checker"),
        ("false", "false", "onnx.checker"),
    ],
)
def test_a_message_loses_what_only_its_developers_can_read(text: str, shown: str | None, fix: str) -> None:
    found = readable(text)
    assert found
    if shown is not None:
        assert found == shown
    assert fix in way_out(found)


def test_reasons_of_our_own_have_a_way_out() -> None:
    assert "other operators" in way_out(NOT_SUPPORTED)
    assert "remove this operator" in way_out(NO_PLUGIN)
    assert way_out("anything else", "do this") == "do this"
