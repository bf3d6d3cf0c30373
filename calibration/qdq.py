"""Insertion of explicit Q/DQ into an ONNX graph, from a placement and ranges; weights become INT8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from maskplan.calibration.graph import node_names
from maskplan.calibration.placement import Placement, require_float_graph
from maskplan.calibration.scales import quantize_weight, scale_of
from maskplan.exporters.subgraphs import subgraphs
from maskplan.exporters.tensors import TensorError, read_values
from maskplan.pipeline.core.errors import InputError, listed


def insert_qdq(model: onnx.ModelProto, placement: Placement, amax: Mapping[str, float]) -> onnx.ModelProto:
    """A copy of an FP32 model with Q/DQ at the places of a placement.

    A quantized tensor `x` gets one QuantizeLinear, and a DequantizeLinear for each node that reads it; both take the
    scalar initializers `x_scale` (float32) and `x_zero_point` (INT8 0). A quantized weight keeps its name and becomes
    INT8, with `_scale` and `_zero_point` (channels,) and a DequantizeLinear for each layer. Other readers of a
    quantized weight read its float values as `_float`. All other names, the metadata and the opset stay, and the same
    arguments give the same bytes.

    Args:
        model: Without external data. Not changed.
        placement: From `place` on this model.
        amax: The largest magnitude to represent of each of the placement's activations; tied ones share the largest.

    Raises:
        InputError: The model has Q/DQ already or its opset is too old, a range is missing or invalid, or a weight has NaN,
            infinities or data that cannot be read; the message names all of them.
    """
    require_float_graph(model)
    scales = _activation_scales(placement, amax)
    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    graph = quantized.graph
    weights = _quantize_weights(graph, placement)
    names = _Names(graph)
    index = {name: n for n, name in enumerate(node_names(graph))}
    after: dict[str, list[onnx.NodeProto]] = {}
    before: dict[int, list[onnx.NodeProto]] = {}
    for activation in placement.activations:
        x = activation.tensor
        scale, zero = names.unused(f"{x}_scale"), names.unused(f"{x}_zero_point")
        graph.initializer.append(numpy_helper.from_array(np.array(scales[x], np.float32), scale))
        graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), zero))
        integers = names.unused(f"{x}_quantized")
        after[x] = [helper.make_node("QuantizeLinear", [x, scale, zero], [integers], names.unused(f"{x}_quantize"))]
        floats: dict[str, str] = {}
        for node, i in activation.uses:
            if node not in floats:
                floats[node] = names.unused(f"{x}_dequantized")
                pair = [integers, scale, zero], [floats[node]], names.unused(f"{x}_dequantize")
                after[x].append(helper.make_node("DequantizeLinear", *pair))
            graph.node[index[node]].input[i] = floats[node]
    for weight in placement.weights:
        w, n = weight.tensor, index[weight.node]
        scale, zero = weights[w]
        pair = [w, scale, zero], [names.unused(f"{w}_dequantized")], names.unused(f"{w}_dequantize")
        before.setdefault(n, []).append(helper.make_node("DequantizeLinear", *pair, axis=weight.axis))
        graph.node[n].input[weight.input] = pair[1][0]
    _insert(graph, before, after)
    return quantized


def _activation_scales(placement: Placement, amax: Mapping[str, float]) -> dict[str, float]:
    tensors = [activation.tensor for activation in placement.activations]
    missing = [tensor for tensor in tensors if tensor not in amax]
    if missing:
        raise InputError(
            "tensors to quantize have no range",
            found=listed(missing),
            fix="calibrate again: the ranges belong to another model or to other options",
        )
    largest = {tensor: float(amax[tensor]) for tensor in tensors}
    scales, offenders = {}, []
    for tensor in tensors:
        try:
            scales[tensor] = scale_of(largest[tensor])
        except ValueError as error:
            offenders.append(f"{tensor}: {error}")
    if offenders:
        raise InputError(
            "ranges cannot be quantized",
            found=listed(offenders),
            fix="look for NaN or overflow in the layers that produce these tensors, or exclude the layers that read them",
        )
    for group in placement.tied:
        scales.update(dict.fromkeys(group, scale_of(max(largest[tensor] for tensor in group))))
    return scales


def _quantize_weights(graph: onnx.GraphProto, placement: Placement) -> dict[str, tuple[str, str]]:
    """Store the weights of a placement as INT8, in place; the names of scale and zero point by weight."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    constants = {node.output[0]: node for node in graph.node if node.op_type == "Constant"}
    axes = {weight.tensor: weight.axis for weight in placement.weights}
    values, offenders = {}, []
    for name, axis in axes.items():
        tensor = stored[name] if name in stored else constants[name].attribute[0].t
        try:
            floats = read_values(tensor, None).array
            values[name] = (floats, *quantize_weight(floats, axis))
        except (TensorError, ValueError) as error:
            offenders.append(f"{name}: {error}")
    if offenders:
        raise InputError(
            "weights cannot be quantized", found=listed(offenders), fix="export the model again from finite weights"
        )
    names = _Names(graph)
    parameters = {}
    _keep_float_copies(graph, placement, {name: entry[0] for name, entry in values.items()}, names)
    for name, (_, integers, scales) in values.items():
        if name not in stored:
            stored[name] = graph.initializer.add()
        stored[name].CopyFrom(numpy_helper.from_array(integers, name))
        parameters[name] = names.unused(f"{name}_scale"), names.unused(f"{name}_zero_point")
        graph.initializer.append(numpy_helper.from_array(scales, parameters[name][0]))
        graph.initializer.append(numpy_helper.from_array(np.zeros(scales.shape, np.int8), parameters[name][1]))
    # The weight is no longer float, and no longer an input that a caller may replace: remove such declarations.
    for declared in (graph.value_info, graph.input):
        kept = [value for value in declared if value.name not in axes]
        del declared[:]
        declared.extend(kept)
    return parameters


def _keep_float_copies(
    graph: onnx.GraphProto, placement: Placement, values: Mapping[str, npt.NDArray[np.float32]], names: _Names
) -> None:
    """Let readers outside the placement read the weights' float values under another name."""
    quantized = {(weight.node, weight.input) for weight in placement.weights}
    floats: dict[str, str] = {}
    for node, own in zip(graph.node, node_names(graph), strict=True):
        for i, name in enumerate(node.input):
            if name in values and (own, i) not in quantized:
                if name not in floats:
                    floats[name] = names.unused(f"{name}_float")
                    graph.initializer.append(numpy_helper.from_array(values[name], floats[name]))
                node.input[i] = floats[name]


def _insert(
    graph: onnx.GraphProto, before: Mapping[int, list[onnx.NodeProto]], after: Mapping[str, list[onnx.NodeProto]]
) -> None:
    """Insert nodes before a node, by its index, or after the producer of a tensor, so that the graph stays sorted.

    Constant nodes whose value is an initializer now are removed.
    """
    stored = {tensor.name for tensor in graph.initializer}
    nodes = [new for value in graph.input for new in after.get(value.name, ())]
    for n, node in enumerate(graph.node):
        if node.op_type == "Constant" and stored.intersection(node.output):
            continue
        nodes += (*before.get(n, ()), node, *(new for name in node.output for new in after.get(name, ())))
    del graph.node[:]
    graph.node.extend(nodes)


class _Names:
    """Names of a graph's tensors and nodes; creates new ones that differ from all of them."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.taken = set(_names_in(graph))

    def unused(self, wanted: str) -> str:
        name, count = wanted, 1
        while name in self.taken:
            count += 1
            name = f"{wanted}_{count}"
        self.taken.add(name)
        return name


def _names_in(graph: onnx.GraphProto) -> Iterator[str]:
    for declared in (graph.input, graph.output, graph.value_info, graph.initializer):
        yield from (value.name for value in declared)
    for node in graph.node:
        yield node.name
        yield from (*node.input, *node.output)
        for inner in subgraphs(node):
            yield from _names_in(inner)
