"""What of a graph lies outside the range of FP16: activations by their measured ranges, Q/DQ by their scales."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from maskplan.exporters.subgraphs import walk_graphs, walk_nodes

LARGEST = float(np.finfo(np.float16).max)
SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)

MARGIN = 2.0
"""Other images give larger activations than those measured: so many times larger must still fit."""

NEVER_LARGER = {
    "AveragePool",
    "Dropout",
    "Flatten",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "Identity",
    "MaxPool",
    "ReduceMax",
    "ReduceMean",
    "Relu",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
"""Operators of one tensor whose output is nowhere larger than that tensor's largest magnitude."""

_INTEGERS = {
    TensorProto.INT4: (-8, 7),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT8: (0, 255),
    TensorProto.INT16: (-32768, 32767),
    TensorProto.UINT16: (0, 65535),
}


def beyond_half(model: onnx.ModelProto, ranges: Mapping[str, float], margin: float = MARGIN) -> dict[str, float]:
    """The activations that overflow FP16, with their largest magnitudes, in the order of the graph.

    A tensor that nobody measured counts as large as the one that it was pooled, reshaped or rectified from. Tensors that are
    quantized count too: of infinity, ONNX Runtime's QuantizeLinear makes the lowest integer.

    Args:
        model: Not changed. Tensors of `ranges` that it does not have are passed over.
        ranges: The largest magnitude of each tensor, measured on data. NaN and infinity overflow.
        margin: Tensors beyond 65504 / `margin` are named.
    """
    initializers = {tensor.name for tensor in model.graph.initializer}
    largest = {value.name: ranges[value.name] for value in model.graph.input if value.name in ranges}
    for node in model.graph.node:
        for name in node.output:
            if name in ranges:
                largest[name] = ranges[name]
        if node.op_type in NEVER_LARGER and node.output[0] not in ranges and node.input[0] in largest:
            largest[node.output[0]] = largest[node.input[0]]
    return {
        name: value for name, value in largest.items() if name not in initializers and not value <= LARGEST / margin
    }


def unfit_scales(graph: onnx.GraphProto) -> dict[str, tuple[str, ...]]:
    """Q/DQ that FP16 scales would break: what is wrong, and the tensors that have to stay FP32.

    A scale must be a normal FP16 number, and the numbers that a node takes or gives, integers times the scale, must be at
    most 65504. Constant scales of FP32 are looked at; those inside a branch or loop keep the whole of it in FP32.
    """
    constants: dict[str, onnx.TensorProto] = {}
    for inner in walk_graphs(graph):
        constants |= {tensor.name: tensor for tensor in inner.initializer}
        for node in (node for node in inner.node if node.op_type == "Constant"):
            constants |= {name: value.t for name in node.output for value in node.attribute if value.name == "value"}
    unfit: dict[str, tuple[str, ...]] = {}
    for outer in graph.node:
        for node in walk_nodes([outer]):
            scale = constants.get(node.input[1]) if is_qdq(node) else None
            if scale is None or scale.data_type != TensorProto.FLOAT:
                continue
            scales = numpy_helper.to_array(scale)
            name = node.name or node.output[0]
            bad = scales[~((scales >= SMALLEST_NORMAL) & (scales <= LARGEST))]
            if bad.size:
                unfit[f"{name} ({scale.name} has {bad.flat[0]:.4g})"] = tuple(outer.output)
            elif (reach := _reach(node, scales, constants)) > LARGEST:
                # What is quantized overflows before it is quantized.
                source = node.input[:1] if node is outer and node.op_type == "QuantizeLinear" else ()
                unfit[f"{name} ({scale.name} reaches {reach:.4g})"] = (*source, *outer.output)
    return unfit


def is_qdq(node: onnx.NodeProto) -> bool:
    """Whether this is ONNX's own QuantizeLinear or DequantizeLinear."""
    return node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.domain in ("", "ai.onnx")


def _reach(node: onnx.NodeProto, scales: npt.NDArray[np.float32], constants: Mapping[str, onnx.TensorProto]) -> float:
    """The largest magnitude that a Q/DQ node's integers stand for; 0 where they are of a type without a table entry."""
    zero_point = constants.get(node.input[2]) if len(node.input) > 2 else None
    integers = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
    typed = zero_point if zero_point is not None else integers
    # Without a zero point QuantizeLinear gives UINT8.
    low, high = _INTEGERS.get(typed.data_type if typed is not None else TensorProto.UINT8, (0, 0))
    zero = numpy_helper.to_array(zero_point).astype(np.int32) if zero_point is not None and high else np.int32(0)
    return float((np.maximum(np.abs(low - zero), np.abs(high - zero)) * scales).max(initial=0))
