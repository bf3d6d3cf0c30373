"""A shift of the bias must shift the outputs, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.layer_bias import bias_slot, shift_bias
from maskplan.exporters.layer_inputs import observed_layers
from maskplan.exporters.weights import weight_uses
from maskplan.pipeline.core.ort_session import open_session

RNG = np.random.default_rng(0)
SHIFT = np.arange(1, 6, dtype=np.float64)


def noise(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def model_of(nodes: list[onnx.NodeProto], tensors: dict[str, np.ndarray], shape: tuple[int, ...]) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", ends, out, [numpy_helper.from_array(t, n) for n, t in tensors.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def node(op: str, inputs: list[str], output: str = "y", **attributes: float) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], **attributes)


CASES = {
    "a bias": ([node("Conv", ["x", "w", "b"])], {"w": (5, 4, 1, 1), "b": (5,)}, (2, 4, 3, 3), 1),
    "no bias": ([node("Conv", ["x", "w"])], {"w": (5, 4, 1, 1)}, (2, 4, 3, 3), 1),
    "an empty bias": ([node("Conv", ["x", "w", ""])], {"w": (5, 4, 1, 1)}, (2, 4, 3, 3), 1),
    "scaled": ([node("Gemm", ["x", "w", "b"], transB=1, alpha=2.0, beta=0.5)], {"w": (5, 4), "b": (5,)}, (3, 4), 1),
    "scaled, no bias": ([node("Gemm", ["x", "w"], transB=1, alpha=2.0)], {"w": (5, 4)}, (3, 4), 1),
    "one number": ([node("Gemm", ["x", "w", "b"], transB=1)], {"w": (5, 4), "b": (1,)}, (3, 4), 1),
    "rows": ([node("Gemm", ["w", "x", "b"])], {"w": (5, 4), "b": (5, 1)}, (4, 3), 0),
    "an Add": ([node("MatMul", ["x", "w"], "h"), node("Add", ["b", "h"])], {"w": (4, 5), "b": (5,)}, (2, 3, 4), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_the_outputs_are_shifted(case: str) -> None:
    nodes, shapes, shape, axis = CASES[case]
    model = model_of(nodes, {name: noise(*size) for name, size in shapes.items()}, shape)
    x = noise(*shape)
    before = open_session(model.SerializeToString()).run(None, {"x": x})[0]
    use = next(iter(weight_uses(model)))
    (layer,), _ = observed_layers(model, [id(use.tensor)], 4)
    slot = bias_slot(model, layer, Path())
    assert slot is not None
    assert slot.before_norm is False
    shift_bias(model, slot, "w", SHIFT, "float32")
    after = open_session(model.SerializeToString()).run(None, {"x": x})[0]
    # A shift is one of the product, before Gemm multiplies it.
    alpha = next((a.f for a in nodes[0].attribute if a.name == "alpha"), 1.0)
    expected = np.moveaxis(np.moveaxis(before, axis, -1) + alpha * SHIFT, -1, axis)
    assert after == pytest.approx(expected, abs=1e-4)
    # A bias that only this node reads keeps its name.
    assert len(model.graph.initializer) == len(shapes) + ("b" not in shapes)


def test_a_bias_of_two_nodes_is_not_shared_any_more() -> None:
    nodes = [node("Conv", ["x", "w", "b"], "h"), node("Conv", ["h", "v", "b"])]
    model = model_of(nodes, {"w": noise(5, 4, 1, 1), "v": noise(5, 5, 1, 1), "b": noise(5)}, (1, 4, 2, 2))
    use = next(iter(weight_uses(model)))
    (layer,), _ = observed_layers(model, [id(use.tensor)], 4)
    slot = bias_slot(model, layer, Path())
    assert slot is not None
    old = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}["b"]
    shift_bias(model, slot, "w", SHIFT, "float32")
    found = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert list(model.graph.node[0].input) == ["x", "w", "w_bias"]
    assert np.array_equal(found["b"], old)
    assert found["w_bias"] == pytest.approx(old + SHIFT, abs=1e-6)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("MatMul", ["x", "w"])],
        [node("MatMul", ["x", "w"], "h"), node("Add", ["h", "h"])],
        [node("MatMul", ["x", "w"], "h"), node("Add", ["h", "scalar"])],
        [node("MatMul", ["x", "w"], "h"), node("Add", ["h", "b"], "i"), node("Mul", ["h", "i"])],
        [node("MatMul", ["x", "w"], "h"), node("MatMul", ["h", "w"])],
    ],
)
def test_a_product_without_a_constant_of_its_own_cannot_be_shifted(nodes: list[onnx.NodeProto]) -> None:
    tensors = {"w": noise(4, 4), "b": noise(4), "scalar": noise()}
    model = model_of(nodes, tensors, (2, 4))
    use = next(iter(weight_uses(model)))
    (layer,), _ = observed_layers(model, [id(use.tensor)], 4)
    assert bias_slot(model, layer, Path()) is None


def test_a_norm_that_reads_the_outputs_alone_is_seen() -> None:
    norm = helper.make_node("BatchNormalization", ["h", "s", "s", "s", "s"], ["y"])
    model = model_of(
        [node("Conv", ["x", "w"], "h"), norm], {"w": noise(4, 4, 1, 1), "s": np.ones(4, np.float32)}, (1, 4, 2, 2)
    )
    use = next(iter(weight_uses(model)))
    (layer,), _ = observed_layers(model, [id(use.tensor)], 4)
    slot = bias_slot(model, layer, Path())
    assert slot is not None
    assert slot.before_norm
