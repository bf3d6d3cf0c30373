"""FP32 ONNX to FP16: weights and arithmetic in half precision, inputs and outputs in single."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.fp32_islands import reads, rename_reads, to_fp32_islands
from maskplan.exporters.half_range import LARGEST, is_qdq, unfit_scales
from maskplan.exporters.subgraphs import subgraphs, walk_graphs
from maskplan.pipeline.core.errors import InputError, listed

log = logging.getLogger(__name__)

# Inputs that the operators define as FP32 whatever the type of their data.
_ALWAYS_FP32 = {"Resize": (1, 2)}
# Operators without a half-precision form.
_FP32_ONLY = {"NonMaxSuppression", "QLinearConv", "QLinearMatMul", "RandomNormal", "RandomUniform", "Range"}
# The first in which scales may be FP16.
_QDQ_OPSET = 19


def to_fp16(model: onnx.ModelProto, keep_fp32: Collection[str] = ()) -> onnx.ModelProto:
    """A half-precision copy of a model, with or without Q/DQ; its inputs and outputs stay FP32.

    Names, metadata and the zeros of weights stay. A small weight may round to zero; it never becomes -0.0. Of Q/DQ the
    scales become FP16, so that all that is not INT8 runs in FP16; integers and zero points stay. Where FP16 cannot hold a
    scale, or what its integers stand for, the layer stays FP32 around its integers, and a warning names the scale.

    Args:
        model: In FP32, in memory as a whole: without external data.
        keep_fp32: Tensors of the main graph that overflow FP16, such as the keys of `beyond_half`. What makes and what reads
            them runs in FP32, between casts; weights that only those nodes read stay FP32.

    Raises:
        InputError: Weights exceed the range of FP16 (65504), operators have no FP16 form, the opset is too old for FP16
            scales (below 19), or `keep_fp32` has names that the graph has not; all are named.
    """
    half = onnx.ModelProto()
    half.CopyFrom(model)
    _require_fp16_forms(half)
    _require_fp16_scales(half)
    unfit = unfit_scales(half.graph)
    if unfit:
        log.warning("layers stay FP32 around their integers, for FP16 cannot hold their scales: %s", listed(unfit))
    _separate_fp32_constants(half.graph)
    wanted = dict.fromkeys((*keep_fp32, *(name for names in unfit.values() for name in names)))
    keep = to_fp32_islands(half, wanted) | _kept_in_fp32(half.graph)
    overflowing: list[str] = []
    for graph in _graphs(half.graph, keep):
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
    _cast_io(half.graph, keep)
    return half


def _kept_in_fp32(graph: onnx.GraphProto) -> set[str]:
    """What must stay FP32 by the operators' definition, and all that it is computed from."""
    keep: set[str] = set()
    for inner in walk_graphs(graph):
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
    for inner in walk_graphs(graph):
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
        if is_qdq(node) and attribute.name == "output_dtype" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16


def _graphs(graph: onnx.GraphProto, keep: set[str]) -> Iterator[onnx.GraphProto]:
    """The graph and those within its nodes, without those of nodes that stay FP32."""
    yield graph
    for node in graph.node:
        if not keep.intersection(node.output):
            for inner in subgraphs(node):
                yield from _graphs(inner, keep)


def _require_fp16_forms(model: onnx.ModelProto) -> None:
    made_of_floats = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    offenders = [
        f"{node.name} ({node.op_type})"
        for graph in walk_graphs(model.graph)
        for node in graph.node
        if node.op_type in _FP32_ONLY and made_of_floats & set(node.input)
    ]
    if offenders:
        raise InputError("operators have no FP16 form", found=listed(offenders), fix="export FP32")


def _require_fp16_scales(model: onnx.ModelProto) -> None:
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < _QDQ_OPSET and any(is_qdq(node) for graph in walk_graphs(model.graph) for node in graph.node):
        raise InputError(
            "the opset has no Q/DQ with FP16 scales",
            where=model.graph.name,
            found=f"opset {opset}; FP16 scales need {_QDQ_OPSET}",
            fix=f"export with opset {_QDQ_OPSET} or later and calibrate that, or keep FP32 scales",
        )


def _halve(tensor: onnx.TensorProto, name: str, overflowing: list[str]) -> None:
    if tensor.data_type != TensorProto.FLOAT:
        return
    values = numpy_helper.to_array(tensor)
    # Infinity itself fits; PyTorch's models use it as the lowest number.
    largest = float(np.abs(values).max(initial=0.0, where=np.isfinite(values)))
    if largest > LARGEST:
        overflowing.append(f"{name} (largest {largest:.4g})")
        return
    # Adding +0.0 turns a negative number that underflowed to -0.0 into +0.0.
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16) + np.float16(0), tensor.name))


def _cast_io(graph: onnx.GraphProto, keep: set[str]) -> None:
    """Keep FP32 at the graph's borders: casts between float inputs and outputs and the nodes in FP16."""
    constants = {tensor.name for tensor in graph.initializer}
    inputs, outputs = (
        [value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT]
        for values in (graph.input, graph.output)
    )
    made = {name: f"{name}_fp16" for name in outputs if name not in keep}
    halves = {name: f"{name}_fp16" for name in inputs if name not in constants}
    in_half: set[str] = set()
    for node in graph.node:
        node.output[:] = [made.get(name, name) for name in node.output]
        if keep.intersection(node.output):
            # It reads the graph's inputs as they are.
            rename_reads(node, made)
        else:
            in_half.update(reads(node))
            rename_reads(node, {**halves, **made})
    nodes = [
        helper.make_node("Cast", [name], [half], f"{name}_to_fp16", to=TensorProto.FLOAT16)
        for name, half in halves.items()
        if name in in_half
    ]
    nodes += graph.node
    nodes += [
        helper.make_node("Cast", [half], [name], f"{name}_to_fp32", to=TensorProto.FLOAT) for name, half in made.items()
    ]
    del graph.node[:]
    graph.node.extend(nodes)
