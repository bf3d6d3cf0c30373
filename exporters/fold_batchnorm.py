"""Folding of BatchNormalization into the preceding Conv, for those whose constants FP16 cannot represent."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from maskplan.exporters.fp16_constants import constant_problems, constant_values, remove_unread
from maskplan.exporters.fp32_islands import reads, unused_name, used_names


def fold_batchnorms(graph: onnx.GraphProto) -> list[str]:
    """Fold, in place, the BatchNormalization nodes whose constants FP16 cannot represent into the preceding Conv.

    Folded in FP64. Zeros of the weight stay zero.

    Returns:
        Names of the nodes that were folded.
    """
    values = constant_values(graph)
    stored = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, int] = {}
    for node in graph.node:
        for name in reads(node):
            readers[name] = readers.get(name, 0) + 1
    outputs = {value.name for value in graph.output}
    producers = {node.output[0]: node for node in graph.node if node.op_type == "Conv"}
    folded = []
    for index, node in enumerate(graph.node):
        if node.op_type != "BatchNormalization" or not any(constant_problems(node, values)):
            continue
        conv = producers.get(node.input[0])
        if conv is None or readers[conv.output[0]] > 1 or conv.output[0] in outputs:
            continue
        trains = any(a.name == "training_mode" and a.i for a in node.attribute)
        own = [name for name in conv.input[1:3] if name]
        is_constant = all(name in stored for name in (*own, *node.input[1:5]))
        if trains or any(node.output[1:]) or not is_constant or any(readers[name] > 1 for name in own):
            continue
        _fold(conv, node, stored, graph)
        folded.append((index, node.name or node.output[0], list(node.input[1:5])))
        conv.output[0] = node.output[0]
    for index, _, constants in reversed(folded):
        del graph.node[index]
        remove_unread(graph, set(constants))
    return [name for _, name, _ in folded]


def _fold(
    conv: onnx.NodeProto, norm: onnx.NodeProto, stored: dict[str, onnx.TensorProto], graph: onnx.GraphProto
) -> None:
    scale, shift, mean, variance = (numpy_helper.to_array(stored[n]).astype(np.float64) for n in norm.input[1:5])
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    gain = scale / np.sqrt(variance + epsilon)
    weight = numpy_helper.to_array(stored[conv.input[1]])
    has_bias = len(conv.input) > 2 and bool(conv.input[2])
    bias = numpy_helper.to_array(stored[conv.input[2]]).astype(np.float64) if has_bias else np.zeros(len(weight))
    new_weight = (weight * gain.reshape(-1, *(1,) * (weight.ndim - 1))).astype(np.float32) + np.float32(0)
    new_bias = ((bias - mean) * gain + shift).astype(np.float32)
    stored[conv.input[1]].CopyFrom(numpy_helper.from_array(new_weight, conv.input[1]))
    name = conv.input[2] if has_bias else unused_name(f"{conv.input[1]}_bias", used_names(graph))
    if not has_bias:
        conv.input[:] = [*conv.input[:2], name]
        stored[name] = graph.initializer.add()
    stored[name].CopyFrom(numpy_helper.from_array(new_bias, name))
