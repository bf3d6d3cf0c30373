"""FP32 ONNX to FP16: weights and arithmetic in half precision, inputs and outputs in single."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipeline.errors import InputError, listed

_LARGEST = float(np.finfo(np.float16).max)
# Inputs that the operators define as FP32 whatever the type of their data.
_ALWAYS_FP32 = {"Resize": (1, 2)}
# Operators without a half-precision form; they run in FP32 between casts.
_FP32_ONLY = {"Range", "NonMaxSuppression", "RandomNormal", "RandomUniform"}


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """A half-precision copy of a model.

    Names, metadata and the zeros of weights stay. A small weight may round to zero; it never becomes -0.0.

    Raises:
        InputError: Weights exceed the range of FP16 (65504), or operators have no FP16 form; all are named.
    """
    half = onnx.ModelProto()
    half.CopyFrom(model)
    _require_fp16_forms(half)
    _separate_fp32_constants(half.graph)
    keep = _kept_in_fp32(half.graph)
    overflowing: list[str] = []
    for graph in _graphs(half.graph):
        for tensor in graph.initializer:
            if tensor.name not in keep:
                _halve(tensor, tensor.name, overflowing)
        for node in graph.node:
            if not keep.intersection(node.output):
                _halve_attributes(node, overflowing)
        if graph is not half.graph:
            for value in (*graph.input, *graph.output):
                if value.type.tensor_type.elem_type == TensorProto.FLOAT:
                    value.type.tensor_type.elem_type = TensorProto.FLOAT16
        del graph.value_info[:]
    if overflowing:
        raise InputError(
            "weights exceed the range of FP16 (65504)",
            found=listed(overflowing),
            fix="export FP32, or rescale these layers",
        )
    _cast_io(half.graph)
    return half


def _kept_in_fp32(graph: onnx.GraphProto) -> set[str]:
    """What must stay FP32 by the operators' definition, and all that it is computed from."""
    keep: set[str] = set()
    for inner in _graphs(graph):
        makers = {name: node for node in inner.node for name in node.output}
        waiting = [
            node.input[i]
            for node in inner.node
            for i in _ALWAYS_FP32.get(node.op_type, ())
            if i < len(node.input) and node.input[i]
        ]
        while waiting:
            name = waiting.pop()
            if name not in keep:
                keep.add(name)
                # A cast begins the chain: what it converts is not FP32 itself.
                if name in makers and makers[name].op_type not in ("Cast", "Shape"):
                    waiting += [source for source in makers[name].input if source]
    return keep


def _separate_fp32_constants(graph: onnx.GraphProto) -> None:
    """Give operators that need an FP32 constant a copy of their own where others use it too."""
    for inner in _graphs(graph):
        constants = {tensor.name: tensor for tensor in inner.initializer}
        uses = Counter(name for node in inner.node for name in node.input)
        for node in inner.node:
            for i in _ALWAYS_FP32.get(node.op_type, ()):
                name = node.input[i] if i < len(node.input) else ""
                if name in constants and uses[name] > 1:
                    copy = inner.initializer.add()
                    copy.CopyFrom(constants[name])
                    copy.name = node.input[i] = f"{name}_fp32_{node.output[0]}"


def _halve_attributes(node: onnx.NodeProto, overflowing: list[str]) -> None:
    name = node.name or node.output[0]
    for attribute in node.attribute:
        if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            numbers = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            tensor = numpy_helper.from_array(np.asarray(numbers, np.float32))
            attribute.CopyFrom(helper.make_attribute("value", tensor))
        if attribute.type == onnx.AttributeProto.TENSOR:
            _halve(attribute.t, name, overflowing)
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


def _require_fp16_forms(model: onnx.ModelProto) -> None:
    made_of_floats = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    offenders = [
        f"{node.name} ({node.op_type})"
        for graph in _graphs(model.graph)
        for node in graph.node
        if node.op_type in _FP32_ONLY and made_of_floats & set(node.input)
    ]
    if offenders:
        raise InputError("operators have no FP16 form", found=listed(offenders), fix="export FP32")


def _halve(tensor: onnx.TensorProto, name: str, overflowing: list[str]) -> None:
    if tensor.data_type != TensorProto.FLOAT:
        return
    values = numpy_helper.to_array(tensor)
    # Infinity itself fits; PyTorch's models use it as the lowest number.
    largest = float(np.abs(values).max(initial=0.0, where=np.isfinite(values)))
    if largest > _LARGEST:
        overflowing.append(f"{name} (largest {largest:.4g})")
        return
    # Adding +0.0 turns a negative number that underflowed to -0.0 into +0.0.
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16) + np.float16(0), tensor.name))


def _cast_io(graph: onnx.GraphProto) -> None:
    """Keep FP32 at the graph's borders: a cast after every float input and before every float output."""
    constants = {tensor.name for tensor in graph.initializer}
    first, last = [], []
    renamed: dict[str, str] = {}
    for value in graph.input:
        if value.name not in constants and value.type.tensor_type.elem_type == TensorProto.FLOAT:
            renamed[value.name] = f"{value.name}_fp16"
            first.append(
                helper.make_node(
                    "Cast",
                    [value.name],
                    [renamed[value.name]],
                    f"{value.name}_to_fp16",
                    to=TensorProto.FLOAT16,
                )
            )
    for value in graph.output:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            renamed[value.name] = f"{value.name}_fp16"
            last.append(
                helper.make_node(
                    "Cast", [renamed[value.name]], [value.name], f"{value.name}_to_fp32", to=TensorProto.FLOAT
                )
            )
    for inner in _graphs(graph):
        for node in inner.node:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [renamed.get(name, name) for name in node.output]
    nodes = [*first, *graph.node, *last]
    del graph.node[:]
    graph.node.extend(nodes)
