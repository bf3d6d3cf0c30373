"""The walk from an ONNX op back to its constant weight, with the reduction axis carried through what lies between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx
from onnx import helper

from pipeline.masking.eligibility import NOT_CONSTANT, ineligible_reason

_OPS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_PASSED_THROUGH = {"Identity", "Cast", "Transpose", "DequantizeLinear", "QuantizeLinear"}


@dataclass(frozen=True)
class WeightUse:
    """One use of a weight by one node.

    Attributes:
        name: Of the initializer or Constant; of the node's input when not constant.
        node: Of the node that uses it.
        op: The node's type.
        tensor: The stored tensor, or None.
        axis: Its reduction axis, as stored.
        groups: Of a convolution; 1 otherwise.
        zero_point: Name of the zero point that means zero in a quantised tensor, or None.
        reason: Why it can never be N:M, or None.
    """

    name: str
    node: str
    op: str
    tensor: onnx.TensorProto | None
    axis: int
    groups: int
    zero_point: onnx.TensorProto | None
    reason: str | None


def weight_uses(model: onnx.ModelProto, m: int = 4) -> Iterator[WeightUse]:
    """Every use of a weight by Conv, ConvTranspose, Gemm and MatMul, in the order of the graph, subgraphs included.

    A MatMul or Gemm of two activations has no weight and is left out.
    """
    yield from _walk(model.graph, {}, {}, m)


def _walk(
    graph: onnx.GraphProto,
    outer_constants: Mapping[str, onnx.TensorProto],
    outer_makers: Mapping[str, onnx.NodeProto],
    m: int,
) -> Iterator[WeightUse]:
    constants = {**outer_constants, **{tensor.name: tensor for tensor in graph.initializer}}
    makers = {**outer_makers, **{name: node for node in graph.node for name in node.output}}
    for node in graph.node:
        if node.op_type in _OPS:
            yield from _uses_of(node, constants, makers, m)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _walk(attribute.g, constants, makers, m)


def _uses_of(
    node: onnx.NodeProto,
    constants: Mapping[str, onnx.TensorProto],
    makers: Mapping[str, onnx.NodeProto],
    m: int,
) -> Iterator[WeightUse]:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    groups = int(attributes.get("group", 1))
    name = node.name or node.output[0]
    if node.op_type in ("Conv", "ConvTranspose"):
        operands = [(1, 1)]
    elif node.op_type == "Gemm":
        operands = [(1, 1 if attributes.get("transB") else 0), (0, 0 if attributes.get("transA") else 1)]
    else:
        operands = [(1, -2), (0, -1)]
    for operand, axis in operands:
        found = _trace(node.input[operand], axis, constants, makers)
        if found is None:
            if node.op_type in ("Conv", "ConvTranspose"):
                yield WeightUse(node.input[1], name, node.op_type, None, axis, groups, None, NOT_CONSTANT)
            continue
        stored, tensor, stored_axis, zero_point = found
        if len(tensor.dims) < 2:
            continue
        reason = ineligible_reason(node.op_type, tensor.dims[stored_axis], groups, m)
        yield WeightUse(stored, name, node.op_type, tensor, stored_axis, groups, zero_point, reason)
        return


def _trace(
    name: str, axis: int, constants: Mapping[str, onnx.TensorProto], makers: Mapping[str, onnx.NodeProto]
) -> tuple[str, onnx.TensorProto, int, onnx.TensorProto | None] | None:
    """Follow `name` to a stored tensor; None when something computes it."""
    perms: list[list[int] | None] = []
    zero_point: onnx.TensorProto | None = None
    seen: set[str] = set()
    while name not in constants:
        maker = makers.get(name)
        if maker is None or name in seen:
            return None
        seen.add(name)
        if maker.op_type == "Constant":
            value = next((a.t for a in maker.attribute if a.name == "value"), None)
            if value is None:
                return None
            return _settle(name, value, axis, perms, zero_point)
        if maker.op_type not in _PASSED_THROUGH or not maker.input:
            return None
        if maker.op_type == "Transpose":
            perms.append(next((list(a.ints) for a in maker.attribute if a.name == "perm"), None))
        if maker.op_type == "DequantizeLinear" and len(maker.input) > 2:
            zero_point = constants.get(maker.input[2])
        name = maker.input[0]
    return _settle(name, constants[name], axis, perms, zero_point)


def _settle(
    name: str,
    tensor: onnx.TensorProto,
    axis: int,
    perms: list[list[int] | None],
    zero_point: onnx.TensorProto | None,
) -> tuple[str, onnx.TensorProto, int, onnx.TensorProto | None] | None:
    rank = len(tensor.dims)
    axis %= rank or 1
    for perm in perms:
        axis = perm[axis] if perm is not None else rank - 1 - axis
    return name, tensor, axis, zero_point
