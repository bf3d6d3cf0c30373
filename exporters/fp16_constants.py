"""Constants that FP16 cannot represent: those that exceed its range, and those that become zero or lose their precision.

A constant is judged at each node that reads it, by what the node does with it: an element of a convolution's weight that
becomes zero is harmless beside larger ones, while a lower bound of a divisor that becomes zero is not. Where a limit at the
end of FP16's range has the same effect as the constant (bounds of Clip, Min and Max, masks before Softmax), the constant is
clamped; all other nodes stay FP32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from maskplan.exporters.fp32_islands import reads, unused_name, used_names
from maskplan.exporters.half_range import MAX_FP16
from maskplan.exporters.subgraphs import walk_graphs, walk_nodes
from maskplan.pipeline.core.weight_ops import WEIGHT_OPS

Floats = npt.NDArray[np.float32]

MAX_RELATIVE_ERROR = 2.0**-8
"""Rounding to FP16 may change a constant by this factor; normal FP16 numbers change by at most 2^-11."""

MASK = -16384.0
"""Replaces masks such as -1e9 that are added before Softmax: exp(MASK) is zero, and MASK plus an activation is finite."""

# Their elements matter one by one; for all other operators only next to the largest element of the constant.
_ELEMENTWISE = {
    "Div",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Log",
    "Max",
    "Min",
    "Mod",
    "Clip",
    "Pow",
    "Reciprocal",
    "Sqrt",
}
# Their output has the values of their first input.
MOVES_VALUES = {
    "Cast",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
}


@dataclass
class BadConstants:
    """What `find_bad_constants` found.

    Attributes:
        reasons: Why a node cannot run in FP16, by its position in the main graph.
        vanishing: Outputs of those of these nodes whose constant vanishes: what divides by them must be FP32 too.
        overflowing: Outputs of those whose constant exceeds FP16: they may exceed it too.
        names: The constants concerned.
    """

    reasons: dict[int, str] = field(default_factory=dict)
    vanishing: set[str] = field(default_factory=set)
    overflowing: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)


def constant_values(graph: onnx.GraphProto) -> dict[str, Floats]:
    """FP32 constants of a graph and its subgraphs by name, also behind nodes that only move values.

    Their shapes are those that are stored, not those behind the nodes that move them.
    """
    values: dict[str, Floats] = {}
    for inner in walk_graphs(graph):
        for tensor in inner.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                values[tensor.name] = numpy_helper.to_array(tensor)
    for node in walk_nodes(graph.node):
        if (own := _constant_of(node)) is not None:
            values[node.output[0]] = own
        elif node.op_type in MOVES_VALUES and node.input and node.input[0] in values:
            to = next((a.i for a in node.attribute if a.name == "to"), TensorProto.FLOAT)
            if to == TensorProto.FLOAT:
                values[node.output[0]] = values[node.input[0]]
    return values


def _constant_of(node: onnx.NodeProto) -> Floats | None:
    if node.op_type not in ("Constant", "ConstantOfShape"):
        return None
    for attribute in node.attribute:
        if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
            return np.asarray(numpy_helper.to_array(attribute.t), np.float32)
        if attribute.name in ("value_float", "value_floats"):
            return np.array(attribute.floats if attribute.name == "value_floats" else [attribute.f], np.float32)
    return None


def find_bad_constants(graph: onnx.GraphProto) -> BadConstants:
    """The nodes of the main graph that read a constant which FP16 cannot represent well enough for them."""
    values = constant_values(graph)
    found = BadConstants()
    for index, outer in enumerate(graph.node):
        for node in walk_nodes([outer]):
            for name, problem in constant_problems(node, values):
                found.names.add(name)
                found.reasons.setdefault(index, f"reads {name}: {problem}")
                (found.overflowing if problem.startswith("exceeds") else found.vanishing).update(outer.output)
    return found


def constant_problems(node: onnx.NodeProto, values: Mapping[str, Floats]) -> Iterator[tuple[str, str]]:
    """Names of the constants that a node reads and cannot have in FP16, each with the problem."""
    if node.op_type in MOVES_VALUES or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        # Judged where the moved values are read; scales of Q/DQ have rules of their own.
        return
    for i, name in enumerate(node.input):
        if name in values and (problem := _problem(node, i, values)) is not None:
            yield name, problem
    # Clip before opset 11 has its bounds as attributes.
    if node.op_type == "Clip":
        for attribute in node.attribute:
            bound = np.array([attribute.f], np.float32)
            if attribute.name in ("min", "max") and (problem := _range_problem(bound, bound)) is not None:
                yield attribute.name, problem


def _problem(node: onnx.NodeProto, index: int, values: Mapping[str, Floats]) -> str | None:
    constant = values[node.input[index]]
    if node.op_type == "BatchNormalization" and index == 4:
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        if (largest := _largest(constant)) > MAX_FP16:
            return f"exceeds FP16 with {largest:.4g}"
        exact = constant.astype(np.float64) + epsilon
        error = np.abs(constant.astype(np.float16).astype(np.float64) + epsilon - exact)
        return "loses precision in FP16" if (error > MAX_RELATIVE_ERROR * np.abs(exact)).any() else None
    if node.op_type in _ELEMENTWISE:
        return _range_problem(constant, constant)
    scale = _largest(constant)
    if node.op_type in WEIGHT_OPS and index == 2:
        # A bias is added to sums of products with the weight.
        weight = values.get(node.input[1])
        scale = max(scale, _largest(weight) if weight is not None else 1.0)
    return _range_problem(constant, np.float32(scale))


def _range_problem(constant: Floats, scale: npt.NDArray[np.float32] | np.float32) -> str | None:
    """What is wrong with the FP16 form of a constant whose errors matter relative to `scale`."""
    if (largest := _largest(constant)) > MAX_FP16:
        return f"exceeds FP16 with {largest:.4g}"
    finite = np.where(np.isfinite(constant), constant, np.float32(0))
    error = np.abs(finite.astype(np.float16).astype(np.float32) - finite)
    bad = finite[error > MAX_RELATIVE_ERROR * np.abs(scale)]
    if not bad.size:
        return None
    worst = float(bad.flat[0])
    return f"{worst:.4g} is {float(np.float16(worst)):.4g} in FP16"


def _largest(constant: Floats) -> float:
    # Infinity exists in FP16; PyTorch models use -inf as the lowest number.
    return float(np.abs(constant).max(initial=0.0, where=np.isfinite(constant)))


def clamp_constants(graph: onnx.GraphProto) -> list[str]:
    """Clamp, in place, the constants beyond FP16 where a limit within FP16 has the same effect.

    Every node whose constant is clamped gets its own copy.

    Returns:
        A description of each constant that was clamped.
    """
    values = constant_values(graph)
    names = used_names(graph)
    replaced: set[str] = set()
    clamped = []
    for inner in walk_graphs(graph):
        masks = _masked_nodes(inner)
        for index, node in enumerate(inner.node):
            for i, name in enumerate(node.input):
                if name not in values or not _largest(values[name]) > MAX_FP16:
                    continue
                if (limited := _clamped(node, i, values[name], is_mask=index in masks)) is None:
                    continue
                tensor = _stored(graph, inner, name)
                if tensor is None:
                    # Behind a node that moves values: its shape is not known here.
                    continue
                copy = inner.initializer.add()
                copy.CopyFrom(numpy_helper.from_array(limited.reshape(tuple(tensor.dims)), ""))
                copy.name = node.input[i] = unused_name(f"{name}_clamped", names)
                replaced.add(name)
                clamped.append(f"{name} at {node.name or node.output[0]}")
            if node.op_type == "Clip":
                clamped += _clamp_attributes(node)
    remove_unread(graph, replaced)
    return clamped


def _clamped(node: onnx.NodeProto, index: int, constant: Floats, *, is_mask: bool) -> Floats | None:
    """The constant within FP16, if it has the same effect at this node."""
    finite = np.isfinite(constant)
    high, low = finite & (constant > MAX_FP16), finite & (constant < -MAX_FP16)
    lower_bound = (node.op_type == "Clip" and index == 1) or node.op_type == "Max"
    upper_bound = (node.op_type == "Clip" and index == 2) or node.op_type == "Min"
    limit = np.float32(MAX_FP16)
    if lower_bound and not high.any():
        return np.where(low, -limit, constant)
    if upper_bound and not low.any():
        return np.where(high, limit, constant)
    if is_mask and not high.any():
        return np.where(low, np.float32(MASK), constant)
    return None


def _clamp_attributes(clip: onnx.NodeProto) -> list[str]:
    clamped = []
    for attribute in clip.attribute:
        limit = {"min": -MAX_FP16, "max": MAX_FP16}.get(attribute.name)
        if limit is not None and np.isfinite(attribute.f) and attribute.f * np.sign(limit) > MAX_FP16:
            attribute.f = limit
            clamped.append(f"{attribute.name} of {clip.name or clip.output[0]}")
    return clamped


def _masked_nodes(graph: onnx.GraphProto) -> set[int]:
    """Positions of the nodes that add or choose a mask whose values are read by Softmax alone."""
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(graph.node):
        for name in reads(node):
            readers.setdefault(name, []).append(index)
    outputs = {value.name for value in graph.output}
    masks: set[int] = set()
    for index in range(len(graph.node) - 1, -1, -1):
        node = graph.node[index]
        if node.op_type not in ("Add", "Where", *MOVES_VALUES) or node.output[0] in outputs:
            continue
        next_nodes = readers.get(node.output[0], [])
        if next_nodes and all(n in masks or graph.node[n].op_type == "Softmax" for n in next_nodes):
            masks.add(index)
    return masks


def _stored(graph: onnx.GraphProto, inner: onnx.GraphProto, name: str) -> onnx.TensorProto | None:
    for scope in (inner, *walk_graphs(graph)):
        for tensor in scope.initializer:
            if tensor.name == name:
                return tensor
        for node in scope.node:
            if name in node.output and node.op_type == "Constant":
                values = _constant_of(node)
                assert values is not None
                is_scalar = any(a.name == "value_float" for a in node.attribute)
                return numpy_helper.from_array(values.reshape(()) if is_scalar else values)
    return None


def remove_unread(graph: onnx.GraphProto, candidates: set[str]) -> None:
    """Remove those of some initializers and Constant nodes that nothing reads any more."""
    read = {name for node in graph.node for name in reads(node)} | {value.name for value in graph.input}
    for inner in walk_graphs(graph):
        read |= {value.name for value in inner.output}
    unread = candidates - read
    for inner in walk_graphs(graph):
        for index in range(len(inner.initializer) - 1, -1, -1):
            if inner.initializer[index].name in unread:
                del inner.initializer[index]
        for index in range(len(inner.node) - 1, -1, -1):
            if inner.node[index].op_type == "Constant" and inner.node[index].output[0] in unread:
                del inner.node[index]
