"""FP16 arithmetic as a GPU computes it, in a graph that ONNX Runtime runs on a CPU.

ONNX Runtime has few FP16 kernels for CPUs: it computes most chains of FP16 nodes in FP32 and rounds at their ends only, so
that neither lost precision nor overflow between nodes would be seen. Here every node computes in FP32 and its result is
rounded.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.fp16_types import infer_value_types
from maskplan.exporters.fp32_islands import unused_name, used_names
from maskplan.exporters.subgraphs import subgraphs

_FP16, _FP32 = TensorProto.FLOAT16, TensorProto.FLOAT


def simulate_fp16(half: onnx.ModelProto) -> onnx.ModelProto:
    """An FP32 model whose values are those of an FP16 model, rounded after every node.

    Inputs and outputs stay as they are: FP32, in the files that `precision.to_fp16` makes.
    """
    model = onnx.ModelProto()
    model.CopyFrom(half)
    types = infer_value_types(half).elements
    names = used_names(model.graph)
    kept = {value.name for value in (*model.graph.input, *model.graph.output)}
    _simulate_graph(model.graph, types, names, kept)
    stored = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name in stored and value.type.tensor_type.elem_type == _FP16:
            value.type.tensor_type.elem_type = _FP32
    return model


def _simulate_graph(graph: onnx.GraphProto, types: Mapping[str, int], names: set[str], kept: set[str]) -> None:
    for tensor in graph.initializer:
        _widen(tensor)
    del graph.value_info[:]
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        _widen_attributes(node)
        for inner in subgraphs(node):
            for value in (*inner.input, *inner.output):
                if value.type.tensor_type.elem_type == _FP16:
                    value.type.tensor_type.elem_type = _FP32
            _simulate_graph(inner, types, names, set())
        rounding = []
        for i, name in enumerate(node.output):
            if types.get(name) == _FP16 and name not in kept and node.op_type != "Constant":
                exact, rounded = unused_name(f"{name}_exact", names), unused_name(f"{name}_rounded", names)
                node.output[i] = exact
                rounding.append(helper.make_node("Cast", [exact], [rounded], to=_FP16))
                rounding.append(helper.make_node("Cast", [rounded], [name], to=_FP32))
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        nodes += [copy, *rounding]
    del graph.node[:]
    graph.node.extend(nodes)


def _widen_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR:
            _widen(attribute.t)
        if attribute.name in ("to", "output_dtype") and attribute.i == _FP16:
            attribute.i = _FP32


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == _FP16:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
