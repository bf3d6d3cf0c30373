"""The walk from an ONNX op back to its constant weight, through Q/DQ, casts, transposes and reshapes.

It has two passes: from the op to the stored tensor, collecting the nodes in between; then, as the tensor's shape is known,
over the same nodes to translate the op's reduction axis into an axis of the tensor as stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from maskplan.exporters.folding import Expression, constant_expression
from maskplan.exporters.scopes import MAX_DEPTH, STANDARD, Scope, scoped_nodes
from maskplan.exporters.tensors import TensorError, read_values
from maskplan.pipeline.core.weight_ops import WEIGHT_OPS
from maskplan.pipeline.masking.eligibility import NOT_CONSTANT, ineligible_reason

_DEQUANTIZE = {"DequantizeLinear", "TRT_FP8DequantizeLinear", "TRT_INT4DequantizeLinear"}
_QUANTIZE = {"QuantizeLinear", "TRT_FP8QuantizeLinear"}
_SAME_SHAPE = {"Identity", "Cast", *_DEQUANTIZE, *_QUANTIZE}
_RESHAPING = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten"}
# A limit on hostile files.
_MAX_RANK = 32


@dataclass(frozen=True)
class ZeroPoint:
    """The zero point of a quantized weight: a stored tensor, and the axis of the weight that its values run along."""

    tensor: onnx.TensorProto
    axis: int


@dataclass(frozen=True)
class Move:
    """A step from the stored tensor to the operand that changes where elements are: a transposition, or else a reshape.

    Attributes:
        perm: Of a transposition; None of a reshape.
        shape: After the step.
    """

    perm: tuple[int, ...] | None
    shape: tuple[int, ...]


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
        expression: Of a weight that nodes compute from stored tensors alone, where no single stored tensor has its groups;
            `computed_weights.folded` computes it. None otherwise.
        outputs: Output channels; with an expression 0 until it is computed.
        operand: Which of the node's inputs the weight is.
        moves: From the tensor as stored to the operand.
    """

    name: str
    node: str
    op: str
    tensor: onnx.TensorProto | None
    axis: int
    groups: int
    zero_point: ZeroPoint | None
    reason: str | None
    expression: Expression | None = None
    outputs: int = 0
    operand: int = 1
    moves: tuple[Move, ...] = ()


def weight_uses(model: onnx.ModelProto, m: int = 4) -> Iterator[WeightUse]:
    """Every use of a weight by Conv, ConvTranspose, Gemm and MatMul, in the order of the graph.

    Includes those in subgraphs and local functions. A MatMul or Gemm of two activations has no weight and is omitted, and so
    is one of two constants, whose result may be a weight.
    """
    for _, _, use in weight_nodes(model, m):
        yield use


def weight_nodes(model: onnx.ModelProto, m: int = 4) -> Iterator[tuple[onnx.NodeProto, Scope, WeightUse]]:
    """As `weight_uses`, each with its node and the scope of the node's names."""
    for node, scope in scoped_nodes(model):
        if node.op_type in WEIGHT_OPS and node.domain in STANDARD:
            for use in _uses_of(node, scope, m):
                yield node, scope, use


def stored_behind(name: str, scope: Scope) -> tuple[str, onnx.TensorProto | None] | None:
    """The stored tensor with two axes or more that a name leads to; its tensor is None if several take part."""
    traced = _trace(name, 0, scope)
    if traced is not None:
        return (traced[0], traced[1]) if len(traced[1].dims) > 1 else None
    found = constant_expression(name, scope)
    return (found.stored[0], None) if found is not None and found.stored else None


def _uses_of(node: onnx.NodeProto, scope: Scope, m: int) -> Iterator[WeightUse]:
    attributes = scope.attributes(node)
    op = WEIGHT_OPS[node.op_type]
    groups = int(attributes.get("group", 1)) if op.is_convolution else 1
    name = node.name or (node.output[0] if node.output else node.op_type)
    if not op.is_convolution and len(node.input) > 1 and all(_is_constant(name, scope) for name in node.input[:2]):
        return
    computed: tuple[Expression, int] | None = None
    for operand in op.operands:
        if operand.index >= len(node.input):
            continue
        operand_name = node.input[operand.index]
        traced = _trace(operand_name, operand.axes(attributes)[0], scope)
        if traced is None:
            found = constant_expression(operand_name, scope) if computed is None else None
            if found is not None and (found.stored or op.is_convolution):
                # The reduction axis is that of the operand: the value is stored as the operator reads it.
                computed = found, operand.axes(attributes)[0]
            continue
        stored, tensor, stored_axis, zero_point, moves = traced
        if len(tensor.dims) < 2:
            continue
        reason = ineligible_reason(node.op_type, tensor.dims[stored_axis], groups, m)
        shape = moves[-1].shape if moves else tuple(tensor.dims)
        yield WeightUse(
            stored,
            name,
            node.op_type,
            tensor,
            stored_axis,
            groups,
            zero_point,
            reason,
            outputs=shape[operand.axes(attributes)[1]],
            operand=operand.index,
            moves=moves,
        )
        return
    if computed is not None:
        expression, axis = computed
        yield WeightUse(expression.name, name, node.op_type, None, axis, groups, None, NOT_CONSTANT, expression)
    elif op.is_convolution:
        # A product of two activations has no weight; a convolution always has one, computed or missing.
        weight_name = node.input[1] if len(node.input) > 1 else ""
        yield WeightUse(weight_name, name, node.op_type, None, 0, groups, None, NOT_CONSTANT)


def _is_constant(name: str, scope: Scope) -> bool:
    return scope.constant(name) is not None or constant_expression(name, scope) is not None


_Traced = tuple[str, onnx.TensorProto, int, ZeroPoint | None, tuple[Move, ...]]


def _trace(name: str, axis: int, scope: Scope) -> _Traced | None:
    """Follow `name` to a stored tensor; None if it is computed, or if the reduction axis is not one stored axis."""
    between: list[tuple[onnx.NodeProto, Scope]] = []
    for _ in range(MAX_DEPTH):
        found, scope = scope.find(name)
        if isinstance(found, onnx.TensorProto):
            return _translate_axis(found.name or name, found, axis, between)
        if found is None:
            return None
        if found.op_type == "Constant":
            value = scope.attributes(found).get("value")
            return _translate_axis(name, value, axis, between) if isinstance(value, onnx.TensorProto) else None
        if found.op_type not in _SAME_SHAPE | _RESHAPING or not found.input:
            return None
        between.append((found, scope))
        name = found.input[0]
    return None


def _translate_axis(
    name: str, tensor: onnx.TensorProto, axis: int, between: Sequence[tuple[onnx.NodeProto, Scope]]
) -> _Traced | None:
    """The traced weight, its axis translated from the op's operand to the stored tensor; None if that is impossible."""
    # Forward, from the tensor to the op: the shape after each node.
    shapes = [tuple(tensor.dims)]
    moves: list[Move] = []
    for node, scope in reversed(between):
        shape = _output_shape(node, scope, shapes[-1])
        if shape is None:
            return None
        if node.op_type in _RESHAPING:
            is_transpose = node.op_type == "Transpose"
            perm = tuple(_perm(scope.attributes(node), len(shape))) if is_transpose else None
            moves.append(Move(perm, shape))
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
            stored = scope.constant(node.input[2])
            if stored is None:
                return None
            zero_point = ZeroPoint(stored, int(scope.attributes(node).get("axis", 1)))
        elif zero_point is not None:
            along = _axis_before(node, scope, zero_point.axis % max(len(after), 1), before, after)
            zero_point = None if along is None else ZeroPoint(zero_point.tensor, along)
    return name, tensor, axis, zero_point, tuple(moves)


def _output_shape(node: onnx.NodeProto, scope: Scope, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The output shape of a node for an input of `shape`; None if it is unknown or does not fit."""
    if node.op_type in _SAME_SHAPE:
        return shape
    attributes = scope.attributes(node)
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
    node: onnx.NodeProto, scope: Scope, axis: int, before: tuple[int, ...], after: tuple[int, ...]
) -> int | None:
    """The axis of `before` that becomes `axis` of `after`; None if a reshape split or merged it."""
    if node.op_type in _SAME_SHAPE:
        return axis
    if node.op_type == "Transpose":
        return _perm(scope.attributes(node), len(before))[axis]
    # Reshapes keep the order of elements: the same axis has the same product of lengths before it, and the same length.
    outer = math.prod(after[:axis])
    for i, length in enumerate(before):
        if math.prod(before[:i]) == outer and length == after[axis]:
            return i
    return None


def _perm(attributes: Mapping[str, Any], rank: int) -> list[int]:
    return list(attributes["perm"]) if "perm" in attributes else list(range(rank))[::-1]


def _integers(name: str, scope: Scope) -> list[int] | None:
    tensor = scope.constant(name)
    if tensor is None or tensor.data_type != onnx.TensorProto.INT64:
        return None
    try:
        values = read_values(tensor, None).array
    except TensorError:
        return None
    return [int(v) for v in values.reshape(-1)] if values.size <= _MAX_RANK else None
