"""The walk from an ONNX op back to its constant weight, through Q/DQ, casts, transposes and reshapes.

It has two passes: from the op to the stored tensor, collecting the nodes in between; then, as the tensor's shape is known,
over the same nodes to translate the op's reduction axis into an axis of the tensor as stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import helper

from maskplan.exporters.subgraphs import subgraphs
from maskplan.exporters.tensors import TensorError, read_values
from maskplan.pipeline.core.weight_ops import WEIGHT_OPS
from maskplan.pipeline.masking.eligibility import NOT_CONSTANT, ineligible_reason

_DEQUANTIZE = {"DequantizeLinear", "TRT_FP8DequantizeLinear", "TRT_INT4DequantizeLinear"}
_QUANTIZE = {"QuantizeLinear", "TRT_FP8QuantizeLinear"}
_SAME_SHAPE = {"Identity", "Cast", *_DEQUANTIZE, *_QUANTIZE}
_RESHAPING = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten"}
# Limits on hostile files: nodes in a chain or nested graphs, and dimensions.
_MAX_DEPTH = 32
_MAX_RANK = 32

UNBAKED = "the weight is multiplied by a mask in the graph: bake the mask into the weight"


@dataclass(frozen=True)
class ZeroPoint:
    """The zero point of a quantized weight: a stored tensor, and the axis of the weight that its values run along."""

    tensor: onnx.TensorProto
    axis: int


@dataclass(frozen=True)
class WeightUse:
    """One use of a weight by one node.

    Attributes:
        name: Of the initializer or Constant; of the node's input if that is not constant.
        node: Name of the node that uses it.
        op: The node's type.
        tensor: The stored tensor; None if it is not constant.
        axis: Reduction axis of the tensor as stored.
        groups: Of a convolution; 1 otherwise.
        zero_point: Of a quantized tensor; None for plain zero.
        reason: Why it can never be N:M; None if it can.
        hint: An explanation for the reader of the report, or None.
    """

    name: str
    node: str
    op: str
    tensor: onnx.TensorProto | None
    axis: int
    groups: int
    zero_point: ZeroPoint | None
    reason: str | None
    hint: str | None = None


def weight_uses(model: onnx.ModelProto, m: int = 4) -> Iterator[WeightUse]:
    """Every use of a weight by Conv, ConvTranspose, Gemm and MatMul, in the order of the graph.

    Includes those in subgraphs and local functions. A MatMul or Gemm of two activations has no weight and is omitted.
    """
    functions = {(f.domain, f.name): f for f in model.functions}
    yield from _walk(_Scope.of(model.graph, None), model.graph.node, functions, m, 0)


@dataclass(frozen=True)
class _Scope:
    """The names that are visible to the nodes of one graph."""

    constants: Mapping[str, onnx.TensorProto]
    producers: Mapping[str, onnx.NodeProto]
    outer: _Scope | None
    # The formal inputs of a function, with the name that the caller passes and the scope of that name.
    passed: Mapping[str, tuple[str, _Scope]] = field(default_factory=dict)
    # Attributes of the call, to which nodes of the function refer by name.
    given: Mapping[str, onnx.AttributeProto] = field(default_factory=dict)

    @staticmethod
    def of(graph: onnx.GraphProto, outer: _Scope | None) -> _Scope:
        producers = {name: node for node in graph.node for name in node.output}
        given = outer.given if outer is not None else {}
        return _Scope({t.name: t for t in graph.initializer}, producers, outer, given=given)

    def find(self, name: str) -> tuple[onnx.TensorProto | onnx.NodeProto | None, _Scope]:
        """The tensor or node that a name refers to, and the scope that contains it."""
        scope: _Scope | None = self
        # Bounded: a function that passes its own input to itself would never end.
        for _ in range(_MAX_DEPTH * _MAX_DEPTH):
            if scope is None:
                break
            if name in scope.constants:
                return scope.constants[name], scope
            if name in scope.producers:
                return scope.producers[name], scope
            if name in scope.passed:
                name, scope = scope.passed[name]
            else:
                scope = scope.outer
        return None, self


_Functions = Mapping[tuple[str, str], onnx.FunctionProto]


def _walk(
    scope: _Scope, nodes: Sequence[onnx.NodeProto], functions: _Functions, m: int, depth: int
) -> Iterator[WeightUse]:
    for node in nodes:
        if node.op_type in WEIGHT_OPS and node.domain in ("", "ai.onnx"):
            yield from _uses_of(node, scope, m)
        if depth >= _MAX_DEPTH:
            continue
        for graph in subgraphs(node):
            yield from _walk(_Scope.of(graph, scope), graph.node, functions, m, depth + 1)
        function = functions.get((node.domain, node.op_type))
        if function is not None:
            yield from _walk(_inside(function, node, scope), function.node, functions, m, depth + 1)


def _inside(function: onnx.FunctionProto, call: onnx.NodeProto, caller: _Scope) -> _Scope:
    defaults = {a.name: a for a in function.attribute_proto}
    return _Scope(
        constants={},
        producers={name: node for node in function.node for name in node.output},
        outer=None,
        passed={formal: (actual, caller) for formal, actual in zip(function.input, call.input, strict=False)},
        given={**defaults, **{a.name: a for a in call.attribute}},
    )


def _uses_of(node: onnx.NodeProto, scope: _Scope, m: int) -> Iterator[WeightUse]:
    attributes = _attributes(node, scope)
    op = WEIGHT_OPS[node.op_type]
    groups = int(attributes.get("group", 1)) if op.is_convolution else 1
    name = node.name or (node.output[0] if node.output else node.op_type)
    unbaked = None
    for operand in op.operands:
        if operand.index >= len(node.input):
            continue
        operand_name = node.input[operand.index]
        traced = _trace(operand_name, operand.axes(attributes)[0], scope)
        if traced is None:
            unbaked = unbaked or _masked_in_graph(operand_name, scope)
            continue
        stored, tensor, stored_axis, zero_point = traced
        if len(tensor.dims) < 2:
            continue
        reason = ineligible_reason(node.op_type, tensor.dims[stored_axis], groups, m)
        yield WeightUse(stored, name, node.op_type, tensor, stored_axis, groups, zero_point, reason)
        return
    if unbaked is not None:
        yield WeightUse(unbaked, name, node.op_type, None, 0, groups, None, NOT_CONSTANT, UNBAKED)
    elif op.is_convolution:
        # A product of two activations has no weight; a convolution always has one, computed or missing.
        weight_name = node.input[1] if len(node.input) > 1 else ""
        yield WeightUse(weight_name, name, node.op_type, None, 0, groups, None, NOT_CONSTANT)


_Traced = tuple[str, onnx.TensorProto, int, ZeroPoint | None]


def _trace(name: str, axis: int, scope: _Scope) -> _Traced | None:
    """Follow `name` to a stored tensor; None if it is computed, or if the reduction axis is not one stored axis."""
    between: list[tuple[onnx.NodeProto, _Scope]] = []
    for _ in range(_MAX_DEPTH):
        found, scope = scope.find(name)
        if isinstance(found, onnx.TensorProto):
            return _translate_axis(found.name or name, found, axis, between)
        if found is None:
            return None
        if found.op_type == "Constant":
            value = _attributes(found, scope).get("value")
            return _translate_axis(name, value, axis, between) if isinstance(value, onnx.TensorProto) else None
        if found.op_type not in _SAME_SHAPE | _RESHAPING or not found.input:
            return None
        between.append((found, scope))
        name = found.input[0]
    return None


def _translate_axis(
    name: str, tensor: onnx.TensorProto, axis: int, between: Sequence[tuple[onnx.NodeProto, _Scope]]
) -> _Traced | None:
    """The traced weight, its axis translated from the op's operand to the stored tensor; None if that is impossible."""
    # Forward, from the tensor to the op: the shape after each node.
    shapes = [tuple(tensor.dims)]
    for node, scope in reversed(between):
        shape = _output_shape(node, scope, shapes[-1])
        if shape is None:
            return None
        shapes.append(shape)
    if not -len(shapes[-1]) <= axis < len(shapes[-1]):
        return None
    axis %= len(shapes[-1])
    zero_point: ZeroPoint | None = None
    # Backward, from the op to the tensor: the axis before each node.
    for (node, scope), before, after in zip(between, shapes[-2::-1], shapes[:0:-1], strict=True):
        previous = _axis_before(node, scope, axis, before, after)
        if previous is None:
            return None
        axis = previous
        if node.op_type in _QUANTIZE:
            # The stored tensor is a float that this node quantizes: its zero is 0.
            zero_point = None
        elif node.op_type in _DEQUANTIZE and len(node.input) > 2 and node.input[2]:
            stored = _constant(node.input[2], scope)
            if stored is None:
                return None
            zero_point = ZeroPoint(stored, int(_attributes(node, scope).get("axis", 1)))
        elif zero_point is not None:
            along = _axis_before(node, scope, zero_point.axis % max(len(after), 1), before, after)
            zero_point = None if along is None else ZeroPoint(zero_point.tensor, along)
    return name, tensor, axis, zero_point


def _output_shape(node: onnx.NodeProto, scope: _Scope, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The output shape of a node for an input of `shape`; None if it is unknown or does not fit."""
    if node.op_type in _SAME_SHAPE:
        return shape
    attributes = _attributes(node, scope)
    if node.op_type == "Transpose":
        perm = _perm(attributes, len(shape))
        return tuple(shape[p] for p in perm) if sorted(perm) == list(range(len(shape))) else None
    if node.op_type == "Flatten":
        at = int(attributes.get("axis", 1))
        return (math.prod(shape[:at]), math.prod(shape[at:])) if -len(shape) <= at <= len(shape) else None
    given = attributes.get("shape" if node.op_type == "Reshape" else "axes")
    if given is None and len(node.input) > 1:
        given = _integers(node.input[1], scope)
    if node.op_type == "Squeeze" and given is None:
        return tuple(d for d in shape if d != 1)
    if given is None:
        return None
    if node.op_type == "Reshape":
        return _reshaped(shape, list(given), bool(attributes.get("allowzero", 0)))
    rank = len(shape) + (len(given) if node.op_type == "Unsqueeze" else 0)
    if any(not -rank <= a < rank for a in given):
        return None
    axes = {a % rank for a in given}
    if node.op_type == "Squeeze":
        return tuple(d for i, d in enumerate(shape) if i not in axes)
    rest = iter(shape)
    return tuple(1 if i in axes else next(rest, 1) for i in range(rank))


def _reshaped(shape: tuple[int, ...], target: list[int], allowzero: bool) -> tuple[int, ...] | None:
    wanted = [shape[i] if d == 0 and not allowzero and i < len(shape) else d for i, d in enumerate(target)]
    size = math.prod(shape)
    if wanted.count(-1) == 1:
        rest = -math.prod(wanted)
        if rest <= 0 or size % rest:
            return None
        wanted[wanted.index(-1)] = size // rest
    return tuple(wanted) if min(wanted, default=1) >= 0 and math.prod(wanted) == size else None


def _axis_before(
    node: onnx.NodeProto, scope: _Scope, axis: int, before: tuple[int, ...], after: tuple[int, ...]
) -> int | None:
    """The axis of `before` that becomes `axis` of `after`; None if a reshape split or merged it."""
    if node.op_type in _SAME_SHAPE:
        return axis
    if node.op_type == "Transpose":
        return _perm(_attributes(node, scope), len(before))[axis]
    # Reshapes keep the order of elements: the same axis has the same product of lengths before it, and the same length.
    outer = math.prod(after[:axis])
    for i, length in enumerate(before):
        if math.prod(before[:i]) == outer and length == after[axis]:
            return i
    return None


def _masked_in_graph(name: str, scope: _Scope) -> str | None:
    """The weight's name if the operand is a product of two stored tensors: a mask that was not baked."""
    producer, scope = scope.find(name)
    if not isinstance(producer, onnx.NodeProto) or producer.op_type not in ("Mul", "Where"):
        return None
    names = [found[0] for operand in producer.input if (found := _trace(operand, 0, scope)) is not None]
    return names[0 if producer.op_type == "Mul" else 1] if len(names) >= 2 else None


def _attributes(node: onnx.NodeProto, scope: _Scope) -> dict[str, Any]:
    values = {}
    for attribute in node.attribute:
        source = scope.given.get(attribute.ref_attr_name) if attribute.ref_attr_name else attribute
        if source is not None:
            values[attribute.name] = helper.get_attribute_value(source)
    return values


def _perm(attributes: Mapping[str, Any], rank: int) -> list[int]:
    return list(attributes["perm"]) if "perm" in attributes else list(range(rank))[::-1]


def _constant(name: str, scope: _Scope) -> onnx.TensorProto | None:
    found, scope = scope.find(name)
    if isinstance(found, onnx.NodeProto) and found.op_type == "Constant":
        found = _attributes(found, scope).get("value")
    return found if isinstance(found, onnx.TensorProto) else None


def _integers(name: str, scope: _Scope) -> list[int] | None:
    tensor = _constant(name, scope)
    if tensor is None or tensor.data_type != onnx.TensorProto.INT64:
        return None
    try:
        values = read_values(tensor, None).array
    except TensorError:
        return None
    return [int(v) for v in values.reshape(-1)] if values.size <= _MAX_RANK else None
