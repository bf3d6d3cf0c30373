"""Conversion of FP32 ONNX to FP16: weights and arithmetic in half precision, inputs and outputs in single precision.

What cannot be FP16 stays FP32, in islands with casts around them (`fp32_islands`): operators and inputs whose type ONNX
fixes (`fp16_types`), constants that FP16 cannot represent (`fp16_constants`), arithmetic that leads to sizes and indices,
activations that overflow, and Q/DQ scales that FP16 cannot represent (`fp16_rules` puts these together). All other floats
are converted.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner, numpy_helper

from maskplan.exporters.fold_batchnorm import fold_batchnorms
from maskplan.exporters.fp16_constants import clamp_constants
from maskplan.exporters.fp16_rules import Fp32Choice
from maskplan.exporters.fp16_types import TypeRules, infer_value_types
from maskplan.exporters.fp32_islands import Islands, rename_reads, to_fp32_islands, unused_name, used_names
from maskplan.exporters.half_range import is_qdq
from maskplan.exporters.metadata import opset_of
from maskplan.exporters.subgraphs import subgraphs, walk_graphs
from maskplan.pipeline.core.errors import InputError, listed

log = logging.getLogger(__name__)

FP16_SCALES_OPSET = 19
"""The first opset whose Q/DQ accept FP16 scales."""

_MAX_LOGGED = 20


@dataclass(frozen=True)
class Fp16Model:
    """A model in FP16.

    Attributes:
        model: Its inputs and outputs are FP32.
        in_fp32: Nodes that stay FP32, with their reasons.
        changed: Constants that were clamped and BatchNormalization nodes that were folded, so that FP16 can represent them.
    """

    model: onnx.ModelProto
    in_fp32: Mapping[str, str]
    changed: tuple[str, ...]


def to_fp16(
    model: onnx.ModelProto, keep_fp32: Collection[str] = (), keep_patterns: Collection[str] = ()
) -> onnx.ModelProto:
    """Convert a model to half precision, as `convert_to_fp16` does, and log what stays FP32."""
    half = convert_to_fp16(model, keep_fp32, keep_patterns)
    if half.changed:
        log.info("changed for FP16: %s", listed(half.changed, _MAX_LOGGED))
    if half.in_fp32:
        nodes = (f"{name} ({reason})" for name, reason in half.in_fp32.items())
        log.info("nodes that stay FP32: %s", listed(nodes, _MAX_LOGGED))
    return half.model


def convert_to_fp16(
    model: onnx.ModelProto, keep_fp32: Collection[str] = (), keep_patterns: Collection[str] = ()
) -> Fp16Model:
    """Convert a model, with or without Q/DQ, to half precision; its inputs and outputs stay FP32.

    Names, metadata and the zeros of weights stay; local functions are inlined. A small weight may round to zero; it never
    becomes -0.0. The scales of Q/DQ become FP16, so that everything except INT8 runs in FP16; integers and zero points stay.
    If FP16 cannot represent a scale, or the floats that its integers represent, the layer keeps its integers but computes in
    FP32, with a warning.

    Args:
        model: In FP32, without external data. Not changed.
        keep_fp32: Tensors of the main graph outside the range of FP16, such as the keys of `outside_fp16`. The nodes that
            produce or read them run in FP32, between casts; weights that only these nodes read stay FP32.
        keep_patterns: Patterns (globs) of names of nodes that stay FP32, or of tensors that do, as with `keep_fp32`.

    Raises:
        InputError: The opset does not allow FP16 scales (below 19), the graph lacks names in `keep_fp32`, or a pattern
            matches nothing. The message names all of them.
    """
    _require_fp16_scales(model)
    _require_known(model.graph, keep_fp32)
    half, changed = prepare_for_fp16(model)
    types = infer_value_types(half)
    choice = Fp32Choice(half.graph, types, TypeRules(half, types))
    # In this order: a node's reason is the first one.
    choice.by_patterns(keep_patterns)
    choice.by_types()
    choice.by_constants()
    choice.by_sizes()
    bad_scales = choice.by_scales()
    if bad_scales:
        log.warning("quantized layers compute in FP32: FP16 cannot represent their scales: %s", listed(bad_scales))
    choice.by_tensors(keep_fp32)
    choice.with_fused()
    in_fp32 = choice.described()
    islands = to_fp32_islands(half.graph, choice.precisions(), types.floats)
    _convert(half.graph, islands)
    _cast_io(half.graph, islands)
    return Fp16Model(half, in_fp32, tuple(changed))


def prepare_for_fp16(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """An FP32 copy of a model that computes the same with fewer values beyond FP16, and what was changed.

    Local functions are inlined, BatchNormalization nodes are folded, and constants are clamped where that is exact.
    """
    prepared = onnx.ModelProto()
    prepared.CopyFrom(model)
    prepared = inline_functions(prepared)
    changed = [f"{name} is folded into the convolution before it" for name in fold_batchnorms(prepared.graph)]
    changed += [f"constant clamped to the range of FP16: {text}" for text in clamp_constants(prepared.graph)]
    return prepared, changed


def inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its local functions inlined, so that every node is of an operator with a schema.

    Raises:
        InputError: A function cannot be inlined.
    """
    if not model.functions:
        return model
    inlined = inliner.inline_local_functions(model, convert_version=True)
    if inlined.functions:
        raise InputError(
            "local functions cannot be inlined",
            where=model.graph.name,
            found=listed(f"{function.domain}::{function.name}" for function in inlined.functions),
            fix="export with one version of each operator set",
        )
    return inlined


def _require_known(graph: onnx.GraphProto, tensors: Collection[str]) -> None:
    known = {name for node in graph.node for name in node.output}
    known |= {value.name for value in (*graph.input, *graph.initializer)}
    missing = [name for name in tensors if name not in known]
    if missing:
        raise InputError(
            "the graph has no such tensors to keep in FP32",
            found=listed(missing),
            fix="name outputs of nodes of the main graph; ranges must come from this model",
        )


def _convert(graph: onnx.GraphProto, islands: Islands) -> None:
    """Convert everything outside the islands, in place."""
    for tensor in graph.initializer:
        if tensor.name not in islands.values:
            _convert_tensor(tensor)
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for value in graph.input:
        # A default value of an input, or a constant that an old exporter lists among the inputs.
        if value.name in stored and stored[value.name].data_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    # Declared types of inner values are no longer true; runtimes infer them.
    del graph.value_info[:]
    for node, precision in zip(graph.node, islands.precisions, strict=True):
        if not precision.is_fp32:
            _convert_node(node)


def _convert_node(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        # These two forms are FP32 by definition, so they become a tensor first.
        if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            numbers = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            tensor = numpy_helper.from_array(np.asarray(numbers, np.float32))
            attribute.CopyFrom(helper.make_attribute("value", tensor))
        if attribute.type == onnx.AttributeProto.TENSOR:
            _convert_tensor(attribute.t)
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        if is_qdq(node) and attribute.name == "output_dtype" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
    if node.op_type == "ConstantOfShape" and not node.attribute:
        # Its default is a zero in FP32.
        node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.zeros(1, np.float16))))
    for inner in subgraphs(node):
        for tensor in inner.initializer:
            _convert_tensor(tensor)
        for value in (*inner.input, *inner.output):
            if value.type.tensor_type.elem_type == TensorProto.FLOAT:
                value.type.tensor_type.elem_type = TensorProto.FLOAT16
        del inner.value_info[:]
        for inner_node in inner.node:
            _convert_node(inner_node)


def _require_fp16_scales(model: onnx.ModelProto) -> None:
    opset = opset_of(model)
    if opset < FP16_SCALES_OPSET and any(is_qdq(node) for graph in walk_graphs(model.graph) for node in graph.node):
        raise InputError(
            "the opset does not allow FP16 scales",
            where=model.graph.name,
            found=f"opset {opset}; FP16 scales need {FP16_SCALES_OPSET}",
            fix=f"export with opset {FP16_SCALES_OPSET} or later and calibrate again, or keep FP32 scales",
        )


def _convert_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        # Adding +0.0 turns a negative number that underflowed to -0.0 into +0.0.
        values = numpy_helper.to_array(tensor).astype(np.float16) + np.float16(0)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _cast_io(graph: onnx.GraphProto, islands: Islands) -> None:
    """Keep inputs and outputs of the graph FP32: insert casts between them and the nodes in FP16."""
    constants = {tensor.name for tensor in graph.initializer}
    inputs, outputs = (
        [value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT]
        for values in (graph.input, graph.output)
    )
    names = used_names(graph)
    # From the name of an FP32 output or input to that of its FP16 copy. An output may also be an input or a stored tensor.
    half_outputs = {
        name: unused_name(f"{name}_fp16", names)
        for name in outputs
        if name not in islands.values and name not in inputs and name not in constants
    }
    half_inputs = {name: unused_name(f"{name}_fp16", names) for name in inputs if name not in constants}
    read_in_half: set[str] = set()
    for node, precision in zip(graph.node, islands.precisions, strict=True):
        node.output[:] = [half_outputs.get(name, name) for name in node.output]
        read_in_half |= precision.reads(node)[1]
        # What reads FP32 reads the graph's inputs directly.
        precision.rename(node, {}, half_inputs)
        rename_reads(node, half_outputs)
    node_names = {node.name for node in graph.node}
    nodes = [
        helper.make_node("Cast", [name], [half], unused_name(f"{name}_to_fp16", node_names), to=TensorProto.FLOAT16)
        for name, half in half_inputs.items()
        if name in read_in_half
    ]
    nodes += graph.node
    nodes += [
        helper.make_node("Cast", [half], [name], unused_name(f"{name}_to_fp32", node_names), to=TensorProto.FLOAT)
        for name, half in half_outputs.items()
    ]
    del graph.node[:]
    graph.node.extend(nodes)
