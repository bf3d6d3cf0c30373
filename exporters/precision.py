"""Conversion of FP32 ONNX to FP16: weights and arithmetic in half precision, inputs and outputs in single precision.

Three things keep parts of a graph in FP32: operators that define an input as FP32 (Resize's scales), activations that
overflow FP16 (`keep_fp32`), and Q/DQ scales that FP16 cannot represent. The first is one set of names; the other two are
islands with casts around them (`fp32_islands`). All other floats are then converted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.fp32_islands import reads, rename_reads, to_fp32_islands
from maskplan.exporters.half_range import MAX_FP16, is_qdq, unrepresentable_scales
from maskplan.exporters.metadata import opset_of
from maskplan.exporters.subgraphs import subgraphs, walk_graphs
from maskplan.pipeline.core.errors import InputError, listed

log = logging.getLogger(__name__)

# Indices of inputs that the operators define as FP32, also where their data is FP16.
_FP32_INPUTS = {"Resize": (1, 2)}
# Operators that are not defined for FP16.
_NO_FP16 = {"NonMaxSuppression", "QLinearConv", "QLinearMatMul", "RandomNormal", "RandomUniform", "Range"}
FP16_SCALES_OPSET = 19
"""The first opset whose Q/DQ accept FP16 scales."""


def to_fp16(model: onnx.ModelProto, keep_fp32: Collection[str] = ()) -> onnx.ModelProto:
    """Convert a model, with or without Q/DQ, to half precision; its inputs and outputs stay FP32.

    Names, metadata and the zeros of weights stay. A small weight may round to zero; it never becomes -0.0. The scales of
    Q/DQ become FP16, so that everything except INT8 runs in FP16; integers and zero points stay. If FP16 cannot represent a
    scale, or the floats that its integers represent, the layer keeps its integers but computes in FP32, with a warning.

    Args:
        model: In FP32, without external data. Not changed.
        keep_fp32: Tensors of the main graph that overflow FP16, such as the keys of `fp16_overflows`. The nodes that produce
            or read them run in FP32, between casts; weights that only these nodes read stay FP32.

    Raises:
        InputError: Weights exceed the range of FP16 (65504), operators are not defined for FP16, the opset does not allow
            FP16 scales (below 19), or the graph lacks names in `keep_fp32`. The message names all of them.
    """
    half = onnx.ModelProto()
    half.CopyFrom(model)
    _require_fp16_ops(half)
    _require_fp16_scales(half)
    bad_scales = unrepresentable_scales(half.graph)
    if bad_scales:
        log.warning("quantized layers compute in FP32: FP16 cannot represent their scales: %s", listed(bad_scales))
    # Before the islands: a constant that Resize shares with other nodes would make FP32 of those as well.
    _duplicate_fp32_constants(half.graph)
    island_tensors = dict.fromkeys((*keep_fp32, *(name for names in bad_scales.values() for name in names)))
    keep = to_fp32_islands(half, island_tensors) | _fp32_by_definition(half.graph)
    overflowing: list[str] = []
    for graph in _fp16_graphs(half.graph, keep):
        for tensor in graph.initializer:
            if tensor.name not in keep:
                _convert_tensor(tensor, tensor.name, overflowing)
        for node in graph.node:
            if not keep.intersection(node.output):
                _convert_attributes(node, overflowing)
        if graph is not half.graph:
            for value in (*graph.input, *graph.output):
                if value.type.tensor_type.elem_type == TensorProto.FLOAT:
                    value.type.tensor_type.elem_type = TensorProto.FLOAT16
        # Declared types of inner values are no longer true; runtimes infer them.
        del graph.value_info[:]
    if overflowing:
        raise InputError(
            "weights exceed the range of FP16 (65504)",
            found=listed(overflowing),
            fix="export FP32, or rescale these layers",
        )
    _cast_io(half.graph, keep)
    return half


def _fp32_by_definition(graph: onnx.GraphProto) -> set[str]:
    """Names that operators define as FP32, and all names that these are computed from."""
    keep: set[str] = set()
    for inner in walk_graphs(graph):
        makers = {name: node for node in inner.node for name in node.output}
        pending = [
            node.input[i]
            for node in inner.node
            for i in _FP32_INPUTS.get(node.op_type, ())
            if i < len(node.input) and node.input[i]
        ]
        while pending:
            name = pending.pop()
            if name not in keep:
                keep.add(name)
                # Stop at a cast: what it converts is not FP32.
                if name in makers and makers[name].op_type not in ("Cast", "Shape"):
                    pending += [source for source in makers[name].input if source]
    return keep


def _duplicate_fp32_constants(graph: onnx.GraphProto) -> None:
    """Give operators that need an FP32 constant their own copy if other nodes read it too."""
    for inner in walk_graphs(graph):
        constants = {tensor.name: tensor for tensor in inner.initializer}
        uses = Counter(name for node in inner.node for name in node.input)
        for node in inner.node:
            for i in _FP32_INPUTS.get(node.op_type, ()):
                name = node.input[i] if i < len(node.input) else ""
                if name in constants and uses[name] > 1:
                    copy = inner.initializer.add()
                    copy.CopyFrom(constants[name])
                    copy.name = node.input[i] = f"{name}_fp32_{node.output[0]}"


def _convert_attributes(node: onnx.NodeProto, overflowing: list[str]) -> None:
    name = node.name or node.output[0]
    for attribute in node.attribute:
        # These two forms are FP32 by definition, so they become a tensor first.
        if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            numbers = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            tensor = numpy_helper.from_array(np.asarray(numbers, np.float32))
            attribute.CopyFrom(helper.make_attribute("value", tensor))
        if attribute.type == onnx.AttributeProto.TENSOR:
            _convert_tensor(attribute.t, name, overflowing)
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        if is_qdq(node) and attribute.name == "output_dtype" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16


def _fp16_graphs(graph: onnx.GraphProto, keep: set[str]) -> Iterator[onnx.GraphProto]:
    """The graph and its nested graphs, except those of nodes that stay FP32: these stay FP32 as a whole."""
    yield graph
    for node in graph.node:
        if not keep.intersection(node.output):
            for inner in subgraphs(node):
                yield from _fp16_graphs(inner, keep)


def _require_fp16_ops(model: onnx.ModelProto) -> None:
    float_initializers = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    offenders = [
        f"{node.name} ({node.op_type})"
        for graph in walk_graphs(model.graph)
        for node in graph.node
        if node.op_type in _NO_FP16 and float_initializers & set(node.input)
    ]
    if offenders:
        raise InputError("operators are not defined for FP16", found=listed(offenders), fix="export FP32")


def _require_fp16_scales(model: onnx.ModelProto) -> None:
    opset = opset_of(model)
    if opset < FP16_SCALES_OPSET and any(is_qdq(node) for graph in walk_graphs(model.graph) for node in graph.node):
        raise InputError(
            "the opset does not allow FP16 scales",
            where=model.graph.name,
            found=f"opset {opset}; FP16 scales need {FP16_SCALES_OPSET}",
            fix=f"export with opset {FP16_SCALES_OPSET} or later and calibrate again, or keep FP32 scales",
        )


def _convert_tensor(tensor: onnx.TensorProto, name: str, overflowing: list[str]) -> None:
    if tensor.data_type != TensorProto.FLOAT:
        return
    values = numpy_helper.to_array(tensor)
    # Infinity exists in FP16; PyTorch models use -inf as the lowest number.
    largest = float(np.abs(values).max(initial=0.0, where=np.isfinite(values)))
    if largest > MAX_FP16:
        overflowing.append(f"{name} (largest {largest:.4g})")
        return
    # Adding +0.0 turns a negative number that underflowed to -0.0 into +0.0.
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16) + np.float16(0), tensor.name))


def _cast_io(graph: onnx.GraphProto, keep: set[str]) -> None:
    """Keep inputs and outputs of the graph FP32: insert casts between them and the nodes in FP16."""
    constants = {tensor.name for tensor in graph.initializer}
    inputs, outputs = (
        [value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT]
        for values in (graph.input, graph.output)
    )
    # From the name of an FP32 output or input to that of its FP16 copy.
    half_outputs = {name: f"{name}_fp16" for name in outputs if name not in keep}
    half_inputs = {name: f"{name}_fp16" for name in inputs if name not in constants}
    read_in_half: set[str] = set()
    for node in graph.node:
        node.output[:] = [half_outputs.get(name, name) for name in node.output]
        if keep.intersection(node.output):
            # Nodes in FP32 read the graph's inputs directly.
            rename_reads(node, half_outputs)
        else:
            read_in_half.update(reads(node))
            rename_reads(node, {**half_inputs, **half_outputs})
    nodes = [
        helper.make_node("Cast", [name], [half], f"{name}_to_fp16", to=TensorProto.FLOAT16)
        for name, half in half_inputs.items()
        if name in read_in_half
    ]
    nodes += graph.node
    nodes += [
        helper.make_node("Cast", [half], [name], f"{name}_to_fp32", to=TensorProto.FLOAT)
        for name, half in half_outputs.items()
    ]
    del graph.node[:]
    graph.node.extend(nodes)
