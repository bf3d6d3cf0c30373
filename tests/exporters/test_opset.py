"""Raising an opset must not change what a model computes, and it is noticed where it does."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.opset import raise_opset, require_same_outputs
from maskplan.pipeline.core.errors import InputError


def old_model(slope: float = 1.0) -> onnx.ModelProto:
    """Opset 9, with operators whose attributes became inputs later: Upsample, Clip, Squeeze."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1] * 4),
        helper.make_node("Clip", ["a"], ["b"], min=0.0, max=slope),
        helper.make_node("ReduceMean", ["b"], ["c"], axes=[2, 3], keepdims=1),
        helper.make_node("Squeeze", ["c"], ["y"], axes=[2, 3]),
    ]
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [value("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=8)
    helper.set_model_props(model, {"author": "someone"})
    return model


def feeds() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)}


@pytest.mark.parametrize("opset", [13, 19])
def test_names_weights_metadata_and_outputs_stay(opset: int) -> None:
    model = old_model()
    raised = raise_opset(model, opset, "m.onnx")
    assert raised.opset_import[0].version == opset
    assert [(p.key, p.value) for p in raised.metadata_props] == [("author", "someone")]
    weights = {t.name: numpy_helper.to_array(t) for t in raised.graph.initializer}
    np.testing.assert_array_equal(weights["w"], numpy_helper.to_array(model.graph.initializer[0]))
    first, second = (onnxruntime.InferenceSession(m.SerializeToString()).run(None, feeds())[0] for m in (model, raised))
    np.testing.assert_allclose(first, second, rtol=1e-5)
    require_same_outputs(model, raised, feeds(), "m.onnx")


def test_other_outputs_are_an_error() -> None:
    with pytest.raises(InputError, match="changes what the model computes") as raised:
        require_same_outputs(old_model(), old_model(slope=0.9), feeds(), "m.onnx")
    assert raised.value.found == "y"
