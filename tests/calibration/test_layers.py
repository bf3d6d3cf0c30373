"""Which layers become INT8 wherever their weights are, every layer with its reason, and sizes of -1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from maskplan.calibration.activations import collect_histograms
from maskplan.calibration.calibrate import Calibrated, CalibrateOptions, calibrate
from maskplan.exporters.metadata import describe_onnx, load_onnx


def noise(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(0.2)


def node(op: str, inputs: list[str], outputs: list[str], name: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, name, **attributes)


def save(path: Path, nodes: list[onnx.NodeProto], tensors: dict[str, Any], batch: int | str = "n") -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (batch, 8, 4, 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    return path


def quantized(path: Path) -> Calibrated:
    """Calibrate with one range for everything."""
    model = load_onnx(path)
    ranges = {name: 8.0 for n in model.graph.node for name in (*n.input, *n.output)}
    return calibrate(describe_onnx(path), ranges, CalibrateOptions(), {"fp32": path.with_suffix(".int8.onnx")})


def run(path: Path, x: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_weights_behind_nodes_become_int8_under_their_own_names(tmp_path: Path) -> None:
    nodes = [
        node("Identity", ["w1"], ["i"]),
        node("Conv", ["x", "i"], ["a"], "copied"),
        node("Transpose", ["w2"], ["t"], perm=[3, 2, 0, 1]),
        node("Conv", ["a", "t"], ["b"], "turned"),
        node("Concat", ["p", "q"], ["j"], axis=0),
        node("Conv", ["b", "j"], ["c"], "joined"),
        node("GlobalAveragePool", ["c"], ["d"]),
        node("Flatten", ["d"], ["e"]),
        node("Transpose", ["w4"], ["u"]),
        node("MatMul", ["e", "u"], ["f"], "product"),
        node("Cast", ["w5"], ["v"], to=TensorProto.FLOAT),
        node("Gemm", ["f", "v"], ["y"], "head", transB=1),
    ]
    tensors = {
        "w1": noise(8, 8, 1, 1),
        "w2": noise(1, 1, 8, 8, seed=1),
        "p": noise(4, 8, 1, 1, seed=2),
        "q": noise(4, 8, 1, 1, seed=3),
        "w4": noise(8, 8, seed=4),
        "w5": noise(4, 8, seed=5).astype(np.float16),
    }
    path = save(tmp_path / "net.onnx", nodes, tensors)
    found = quantized(path)
    assert [(la.node, la.op, la.weight, la.dtype, la.reason) for la in found.layers] == [
        ("copied", "Conv", "w1", "int8", None),
        ("turned", "Conv", "w2", "int8", None),
        ("joined", "Conv", "j", "int8", None),
        ("product", "MatMul", "w4", "int8", None),
        ("head", "Gemm", "w5", "int8", None),
    ]
    x = noise(2, 8, 4, 4, seed=6)
    assert np.allclose(run(found.models[0].path, x), run(path, x), atol=0.05)


def test_every_other_layer_is_listed_with_its_reason(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [node("Conv", ["a", "w3"], ["z"], "nested")], "b", [], [helper.make_tensor_value_info("z", 1, None)]
    )
    nodes = [
        node("Conv", ["x", "w1"], ["a"], "plain"),
        node("If", ["yes"], ["b"], "choice", then_branch=branch, else_branch=branch),
        node("ConvTranspose", ["b", "w2"], ["c"], "up"),
        node("FusedConv", ["c", "w2"], ["d"], "fused", domain="com.microsoft"),
        node("ReduceMean", ["d"], ["m"], keepdims=1),
        node("Mul", ["w2", "m"], ["w"]),
        node("Conv", ["d", "w"], ["e"], "made"),
        node("MatMul", ["e", "e"], ["y"], "pair"),
    ]
    tensors = {"w1": noise(8, 8, 1, 1), "w2": noise(8, 8, 1, 1, seed=1), "w3": noise(8, 8, 1, 1), "yes": np.array(True)}
    found = quantized(save(tmp_path / "net.onnx", nodes, tensors))
    assert {layer.node: layer.reason for layer in found.layers} == {
        "plain": None,
        "nested": "inside a subgraph of choice",
        "up": "ConvTranspose is not quantized",
        "fused": "FusedConv is not quantized: an operator of ONNX Runtime: give the file that it was made from",
        "made": "its weight is not constant",
        "pair": "MatMul of two activations",
    }


def test_a_size_of_minus_one_is_dynamic(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w"], ["y"], "conv")]
    tensors = {"w": noise(8, 8, 1, 1)}
    odd = save(tmp_path / "odd.onnx", nodes, tensors, batch=-1)
    assert onnx.load(odd).graph.input[0].type.tensor_type.shape.dim[0].dim_value == -1
    assert describe_onnx(odd).inputs[0].shape == (None, 8, 4, 4)
    x = noise(5, 8, 4, 4)
    plain = load_onnx(save(tmp_path / "ok.onnx", nodes, tensors))
    for model in (onnx.load(odd), load_onnx(odd)):
        found = collect_histograms(model, ["x", "y"], [x, x[:2]])
        expected = collect_histograms(plain, ["x", "y"], [x, x[:2]])
        assert {name: h.amax for name, h in found.items()} == pytest.approx({n: h.amax for n, h in expected.items()})
