"""A small classifier as an ONNX file: a stem, a 2:4 convolution and a head, on images (3, 8, 8), to five logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.metadata import write_provenance
from maskplan.pipeline.core.artifacts import Provenance


def small_net(
    path: Path,
    dtype: str = "float32",
    *,
    batch: int | str = "batch",
    size: int | str = 8,
    provenance: Provenance | None = None,
) -> Path:
    """Write the model, with float32 inputs and outputs for any dtype of the weights, like our exports.

    Nodes have the names of their weights.
    """
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(16, 16, 3, 3)) / 8
    mix[:, ::2] = 0
    tensors = {"stem": generator.normal(size=(16, 3, 3, 3)), "mix": mix, "head": generator.normal(size=(5, 16))}
    is_half = dtype == "float16"
    nodes = [
        helper.make_node("Conv", ["half" if is_half else "input", "stem"], ["a"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Conv", ["b", "mix"], ["c"], "mix", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"], "pool"),
        helper.make_node("Flatten", ["d"], ["e"], "flatten"),
        helper.make_node("Gemm", ["e", "head"], ["f" if is_half else "logits"], "head", transB=1),
    ]
    if is_half:
        nodes.insert(0, helper.make_node("Cast", ["input"], ["half"], "cast", to=TensorProto.FLOAT16))
        nodes.append(helper.make_node("Cast", ["f"], ["logits"], "back", to=TensorProto.FLOAT))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 5])],
        [numpy_helper.from_array(value.astype(dtype), name) for name, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if provenance is not None:
        write_provenance(model, provenance)
    path.write_bytes(model.SerializeToString())
    return path
