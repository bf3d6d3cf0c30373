"""Sessions of ONNX Runtime: files that its optimizer breaks still run, and that is said."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from concat_net import concat_input, concat_qdq_fp16, detector_qdq_fp16
from fp16_graphs import run
from onnx import TensorProto, helper, numpy_helper

from maskplan.engines.ort import build_ort
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import Profile
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.ort_session import UNFUSED, is_unfused, open_session


def test_a_concat_with_fp16_scales_runs_without_the_fusion_that_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = concat_qdq_fp16(tmp_path / "concat.onnx")
    # If this no longer fails, the retry is no longer needed.
    with pytest.raises(Exception, match="QLinearConcat"):
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with caplog.at_level(logging.INFO, "maskplan"):
        session = open_session(path)
        open_session(path)
    assert is_unfused(session)
    assert caplog.text.count(UNFUSED) == 1
    (expected,) = run(onnx.load(path), concat_input(), optimized=False)
    assert np.allclose(session.run(None, {"x": concat_input()})[0], expected, atol=1e-2)
    assert np.abs(expected).max() > 0.1


def test_the_concatenations_of_a_detector_run(tmp_path: Path) -> None:
    path = detector_qdq_fp16(tmp_path / "detector.onnx")
    model = onnx.load(path)
    assert sum(node.op_type == "Concat" for node in model.graph.node) == 6
    (expected,) = run(model, concat_input(), optimized=False)
    assert np.allclose(open_session(path).run(None, {"x": concat_input()})[0], expected, atol=5e-2)
    assert np.abs(expected).max() > 0.5


def test_the_engine_is_the_same_file_and_its_record_says_how_it_runs(tmp_path: Path) -> None:
    path = concat_qdq_fp16(tmp_path / "concat.onnx")
    engine = build_ort(describe_onnx(path), (Profile(1, 1, 1),), False, tmp_path / "engine.onnx")
    assert engine.notes == (UNFUSED,)
    assert engine.path.read_bytes() == path.read_bytes()


def patch_embedding(path: Path) -> Path:
    """The first layers of a vision transformer in FP16: patches by a Conv, then LayerNormalization and a projection."""
    half = TensorProto.FLOAT16
    stored = {
        "kernel": np.full((4, 3, 8, 8), 0.01, np.float16),
        "tokens": np.array([0, 4, 16]),
        "scale": np.ones(4, np.float16),
        "projection": np.eye(4, dtype=np.float16),
    }
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["patches"], strides=[8, 8]),
        helper.make_node("Reshape", ["patches", "tokens"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["sequence"], perm=[0, 2, 1]),
        helper.make_node("LayerNormalization", ["sequence", "scale"], ["normal"], axis=-1),
        helper.make_node("Transpose", ["normal"], ["first"], perm=[1, 0, 2]),
        helper.make_node("MatMul", ["first", "projection"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "patches",
        [helper.make_tensor_value_info("x", half, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("y", half, None)],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def test_an_fp16_vision_transformer_does_not_end_the_process(tmp_path: Path) -> None:
    path = patch_embedding(tmp_path / "vit.onnx")
    lines = (
        "import sys; from pathlib import Path; from maskplan.pipeline.core.ort_session import open_session",
        "path = Path(sys.argv[1]); open_session(path); open_session(path.read_bytes()); print('opened')",
    )
    result = subprocess.run(  # a process of its own: without the workaround it ends by a segmentation fault
        [sys.executable, "-c", "\n".join(lines), str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout == "opened\n", (result.returncode, result.stderr)


@pytest.mark.parametrize("op", ["Conv", "MatMul"])
def test_products_of_int8_do_not_saturate(op: str) -> None:
    """Largest inputs times largest weights: the sum of 16, times 9 pixels for the convolution, on any CPU."""
    size, shape = ((16, 16, 3, 3), (1, 16, 8, 8)) if op == "Conv" else ((16, 16), (4, 16))
    stored = {
        "w": np.full(size, 127, np.int8),
        "unit": np.float32(1 / 127),
        "coarse": np.float32(4),
        "zero": np.int8(0),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "unit", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "unit", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "unit", "zero"], ["wd"]),
        helper.make_node(op, ["xd", "wd"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "coarse", "zero"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "coarse", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    (found,) = open_session(model.SerializeToString()).run(None, {"x": np.ones(shape, np.float32)})
    assert (found == (144 if op == "Conv" else 16)).all()


def test_other_failures_are_not_retried(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\x08\x0a")
    with pytest.raises(InputError, match="does not accept the file"):
        open_session(path)
