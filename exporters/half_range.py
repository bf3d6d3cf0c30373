"""Parts of a graph that exceed the range of FP16: activations, by their measured ranges, and Q/DQ, by their scales."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from maskplan.exporters.subgraphs import walk_graphs, walk_nodes

MAX_FP16 = float(np.finfo(np.float16).max)
MIN_NORMAL_FP16 = float(np.finfo(np.float16).smallest_normal)

MARGIN = 2.0
"""Other images may give larger activations than those measured; up to this factor they must still fit into FP16."""

NON_INCREASING_OPS = {
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
"""Operators whose output never exceeds the largest magnitude of their first input."""

_INTEGER_RANGES = {
    TensorProto.INT4: (-8, 7),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT8: (0, 255),
    TensorProto.INT16: (-32768, 32767),
    TensorProto.UINT16: (0, 65535),
}


def fp16_overflows(model: onnx.ModelProto, ranges: Mapping[str, float], margin: float = MARGIN) -> dict[str, float]:
    """The activations that overflow FP16, with their largest magnitudes, in the order of the graph.

    A tensor without a measured range has the range of the tensor from which it is pooled, reshaped or rectified. Tensors
    that are quantized next are included: QuantizeLinear of ONNX Runtime turns infinity into the lowest integer.

    Args:
        model: Not changed. Names in `ranges` that it does not have are ignored.
        ranges: The largest magnitude of each tensor, measured on data. NaN and infinity overflow.
        margin: Tensors with magnitudes above 65504 / `margin` overflow.
    """
    initializers = {tensor.name for tensor in model.graph.initializer}
    largest = {value.name: ranges[value.name] for value in model.graph.input if value.name in ranges}
    for node in model.graph.node:
        for name in node.output:
            if name in ranges:
                largest[name] = ranges[name]
        if node.op_type in NON_INCREASING_OPS and node.output[0] not in ranges and node.input[0] in largest:
            largest[node.output[0]] = largest[node.input[0]]
    return {
        name: value for name, value in largest.items() if name not in initializers and not value <= MAX_FP16 / margin
    }


def outside_fp16(model: onnx.ModelProto, ranges: Mapping[str, float]) -> dict[str, float]:
    """The activations that overflow or vanish in FP16, with their largest magnitudes.

    One vanishes where its largest magnitude is below the smallest normal FP16 number (6.1e-05): FP16 loses precision there
    with every bit. Tensors without a measured range never vanish.

    Args:
        model: Not changed. Names in `ranges` that it does not have are ignored.
        ranges: The largest magnitude of each tensor, measured on data.
    """
    produced = {name for node in model.graph.node for name in node.output}
    vanishing = {name: value for name, value in ranges.items() if name in produced and 0 < value < MIN_NORMAL_FP16}
    return fp16_overflows(model, ranges) | vanishing


def unrepresentable_scales(graph: onnx.GraphProto) -> dict[str, tuple[str, ...]]:
    """Q/DQ nodes that do not work with FP16 scales: a description of each problem, and the tensors that must stay FP32.

    A scale must be a normal FP16 number, and the floats that a node reads or returns (integers times the scale) must not
    exceed 65504. Only constant FP32 scales are checked. A problem inside a branch or loop keeps all of it in FP32.
    """
    constants: dict[str, onnx.TensorProto] = {}
    for inner in walk_graphs(graph):
        constants |= {tensor.name: tensor for tensor in inner.initializer}
        for node in (node for node in inner.node if node.op_type == "Constant"):
            constants |= {name: value.t for name in node.output for value in node.attribute if value.name == "value"}
    problems: dict[str, tuple[str, ...]] = {}
    for outer in graph.node:
        for node in walk_nodes([outer]):
            scale = constants.get(node.input[1]) if is_qdq(node) else None
            if scale is None or scale.data_type != TensorProto.FLOAT:
                continue
            scales = numpy_helper.to_array(scale)
            name = node.name or node.output[0]
            bad = scales[~((scales >= MIN_NORMAL_FP16) & (scales <= MAX_FP16))]
            if bad.size:
                problems[f"{name} ({scale.name} has {bad.flat[0]:.4g})"] = tuple(outer.output)
            elif (largest := _largest_float(node, scales, constants)) > MAX_FP16:
                # The float input overflows before QuantizeLinear reads it, so its producer must stay FP32 as well.
                source = node.input[:1] if node is outer and node.op_type == "QuantizeLinear" else ()
                problems[f"{name} ({scale.name} reaches {largest:.4g})"] = (*source, *outer.output)
    return problems


def is_qdq(node: onnx.NodeProto) -> bool:
    """Whether this is ONNX's own QuantizeLinear or DequantizeLinear."""
    return node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.domain in ("", "ai.onnx")


def _largest_float(
    node: onnx.NodeProto, scales: npt.NDArray[np.float32], constants: Mapping[str, onnx.TensorProto]
) -> float:
    """The largest magnitude that a Q/DQ node's integers can represent; 0 for types without an entry in the table."""
    zero_point = constants.get(node.input[2]) if len(node.input) > 2 else None
    integers = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
    typed = zero_point if zero_point is not None else integers
    # Without a zero point QuantizeLinear returns UINT8.
    low, high = _INTEGER_RANGES.get(typed.data_type if typed is not None else TensorProto.UINT8, (0, 0))
    zero = numpy_helper.to_array(zero_point).astype(np.int32) if zero_point is not None and high else np.int32(0)
    return float((np.maximum(np.abs(low - zero), np.abs(high - zero)) * scales).max(initial=0))
