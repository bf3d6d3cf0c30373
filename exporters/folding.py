"""Values that nodes compute from stored tensors alone, such as a normalized weight: found in the graph, and computed.

Only operators that are listed here are computed, in the types and shapes that ONNX gives them, and no result may be much
larger than a weight is: a small hostile file could ask for terabytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from maskplan.exporters.scopes import MAX_DEPTH, STANDARD, Scope
from maskplan.exporters.tensors import Array, native_values

# Of one result, and nodes of one expression.
_MAX_ELEMENTS = 1 << 28
_MAX_NODES = 512
# Their outputs differ between runs.
_RANDOM = {
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
    "Dropout",
}

# Beside a node's attributes: how many outputs it has.
_OUTPUTS = "number of outputs"

_Inputs = Sequence[Array | None]
_Attributes = Mapping[str, Any]


class FoldError(ValueError):
    """An expression that cannot be computed here; the message says why."""


@dataclass(frozen=True)
class Expression:
    """A value that depends on stored tensors alone.

    Attributes:
        name: Of the value in the graph.
        scope: Where the name is visible.
        op: The operator that produces it.
        stored: Names of the stored tensors with two axes or more that it is computed from.
    """

    name: str
    scope: Scope
    op: str
    stored: tuple[str, ...]


def constant_expression(name: str, scope: Scope) -> Expression | None:
    """The expression that computes a value from stored tensors alone; None if an input of the graph takes part."""
    producer, _ = scope.find(name)
    if not isinstance(producer, onnx.NodeProto):
        return None
    stored: dict[str, None] = {}
    wanted, seen = [(name, scope)], set[tuple[str, int]]()
    while wanted:
        current, visible = wanted.pop()
        found, holder = visible.find(current)
        if (current, id(holder)) in seen:
            continue
        seen.add((current, id(holder)))
        if isinstance(found, onnx.TensorProto):
            if len(found.dims) > 1:
                stored[found.name or current] = None
            continue
        if found is None or found.op_type in _RANDOM or len(seen) > _MAX_NODES or _has_graph(found):
            return None
        value = holder.attributes(found).get("value") if found.op_type == "Constant" else None
        if isinstance(value, onnx.TensorProto) and len(value.dims) > 1:
            stored[current] = None
        wanted += [(operand, holder) for operand in found.input if operand]
    return Expression(name, scope, producer.op_type, tuple(stored))


def _has_graph(node: onnx.NodeProto) -> bool:
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)


def fold(expression: Expression, folder: Path | None) -> Array:
    """The value of an expression.

    Args:
        expression: From `constant_expression`.
        folder: Of the ONNX file, for external data.

    Raises:
        FoldError: An operator of it is not computed here, its operands do not fit, or the result is too large.
        TensorError: A stored tensor cannot be read.
    """
    values: dict[tuple[str, int], Array] = {}
    # In depth: what a node needs is computed before the node.
    stack = [(expression.name, expression.scope)]
    begun = set[tuple[str, int]]()
    while stack:
        name, visible = stack[-1]
        found, holder = visible.find(name)
        key = (name, id(visible))
        if key in values:
            stack.pop()
        elif isinstance(found, onnx.TensorProto):
            values[key] = native_values(found, folder)
        elif found is None or len(stack) > _MAX_NODES:
            raise FoldError(f"{name} is not found" if found is None else "too many nodes")
        else:
            missing = [(n, holder) for n in found.input if n and (n, id(holder)) not in values]
            begun.add(key)
            if any((n, id(at)) in begun for n, at in missing):
                raise FoldError(f"{name} depends on itself")
            if missing:
                stack += missing
                continue
            operands = [values[n, id(holder)] if n else None for n in found.input]
            results = _computed(found, operands, holder.attributes(found), folder)
            for output, value in zip(found.output, results, strict=False):
                values[output, id(holder)] = value
            # The name of a function's input differs from the name that the caller passes.
            at = next((i for i, output in enumerate(found.output) if output == name), 0)
            values[key] = results[at] if len(results) > at else results[0]
    return values[expression.name, id(expression.scope)]


def _computed(node: onnx.NodeProto, operands: _Inputs, attributes: _Attributes, folder: Path | None) -> list[Array]:
    if node.domain not in STANDARD:
        raise FoldError(f"{node.domain}.{node.op_type} is not computed here")
    if node.op_type == "Constant":
        return [_constant(attributes, folder)]
    compute = _OPERATORS.get(node.op_type)
    if compute is None:
        raise FoldError(f"{node.op_type} is not computed here")
    try:
        with np.errstate(all="ignore"):
            found = compute(operands, {**attributes, _OUTPUTS: len(node.output)})
    except FoldError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, ZeroDivisionError) as error:
        raise FoldError(f"{node.op_type}: {error}") from error
    results = list(found) if isinstance(found, tuple) else [found]
    first = next((operand for operand in operands if operand is not None), None)
    if node.op_type in _ARITHMETIC and first is not None:
        results = [np.asarray(r).astype(first.dtype, copy=False) for r in results]
    return [np.asarray(r) for r in results]


def _constant(attributes: _Attributes, folder: Path | None) -> Array:
    for key, dtype in (("value_float", "f4"), ("value_floats", "f4"), ("value_int", "i8"), ("value_ints", "i8")):
        if key in attributes:
            return np.asarray(attributes[key], dtype)
    value = attributes.get("value")
    if not isinstance(value, onnx.TensorProto):
        raise FoldError("a Constant that holds no tensor")
    return native_values(value, folder)


def _limited(shape: Sequence[int]) -> tuple[int, ...]:
    if math.prod(shape) > _MAX_ELEMENTS or len(shape) > MAX_DEPTH:
        raise FoldError(f"a value of shape {tuple(shape)} is too large")
    return tuple(int(d) for d in shape)


def _broadcast(compute: Callable[..., Array]) -> Callable[[_Inputs, _Attributes], Array]:
    def run(operands: _Inputs, _: _Attributes) -> Array:
        arrays = [a for a in operands if a is not None]
        _limited(np.broadcast_shapes(*(a.shape for a in arrays)))
        found = arrays[0]
        for other in arrays[1:]:
            found = compute(found, other)
        return found

    return run


def _unary(compute: Callable[[Array], Array]) -> Callable[[_Inputs, _Attributes], Array]:
    return lambda operands, _: compute(_first(operands))


def _first(operands: _Inputs) -> Array:
    if not operands or operands[0] is None:
        raise FoldError("a missing operand")
    return operands[0]


def _numbers(operands: _Inputs, attributes: _Attributes, index: int, key: str) -> list[int] | None:
    """Integers that are an attribute in older opsets and an input in newer ones."""
    if key in attributes:
        return [int(v) for v in np.atleast_1d(attributes[key])]
    given = operands[index] if index < len(operands) else None
    return None if given is None else [int(v) for v in given.reshape(-1)]


def _reduce(compute: Callable[..., Array]) -> Callable[[_Inputs, _Attributes], Array]:
    def run(operands: _Inputs, attributes: _Attributes) -> Array:
        axes = _numbers(operands, attributes, 1, "axes")
        if not axes and attributes.get("noop_with_empty_axes"):
            return _first(operands)
        chosen = tuple(axes) if axes else None
        return compute(_first(operands), axis=chosen, keepdims=bool(attributes.get("keepdims", 1)))

    return run


def _norm(x: Array, **how: Any) -> Array:
    length: Array = np.sqrt(np.sum(np.square(x), **how))
    return length


def _reshape(operands: _Inputs, attributes: _Attributes) -> Array:
    x, target = _first(operands), _numbers(operands, attributes, 1, "shape") or []
    zero = not attributes.get("allowzero", 0)
    return x.reshape([x.shape[i] if d == 0 and zero else d for i, d in enumerate(target)])


def _unsqueeze(operands: _Inputs, attributes: _Attributes) -> Array:
    return np.expand_dims(_first(operands), tuple(_numbers(operands, attributes, 1, "axes") or ()))


def _squeeze(operands: _Inputs, attributes: _Attributes) -> Array:
    axes = _numbers(operands, attributes, 1, "axes")
    return np.squeeze(_first(operands), None if axes is None else tuple(axes))


def _flatten(operands: _Inputs, attributes: _Attributes) -> Array:
    x, at = _first(operands), int(attributes.get("axis", 1))
    return x.reshape(math.prod(x.shape[:at]), math.prod(x.shape[at:]))


def _concat(operands: _Inputs, attributes: _Attributes) -> Array:
    return np.concatenate([a for a in operands if a is not None], int(attributes["axis"]))


def _split(operands: _Inputs, attributes: _Attributes) -> tuple[Array, ...]:
    x, axis = _first(operands), int(attributes.get("axis", 0))
    sizes = _numbers(operands, attributes, 1, "split")
    if sizes is None:
        # In equal parts, of which the last may be smaller.
        parts = attributes[_OUTPUTS]
        size = -(-x.shape[axis] // parts)
        sizes = [size] * (parts - 1) + [x.shape[axis] - size * (parts - 1)]
    if sum(sizes) != x.shape[axis] or min(sizes) < 0:
        raise FoldError(f"Split of {x.shape[axis]} into {sizes}")
    return tuple(np.split(x, np.cumsum(sizes)[:-1], axis))


def _slice(operands: _Inputs, attributes: _Attributes) -> Array:
    x = _first(operands)
    starts, ends = _numbers(operands, attributes, 1, "starts") or [], _numbers(operands, attributes, 2, "ends") or []
    axes = _numbers(operands, attributes, 3, "axes") or list(range(len(starts)))
    steps = _numbers(operands, attributes, 4, "steps") or [1] * len(starts)
    index: list[slice] = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # Backward, an end before the first element is written as a number below -length, which Python wraps.
        stop = None if step < 0 and end < -x.shape[axis] else end
        index[axis] = slice(start, stop, step)
    return x[tuple(index)]


def _gather(operands: _Inputs, attributes: _Attributes) -> Array:
    x, indices, axis = _first(operands), operands[1], int(attributes.get("axis", 0))
    if indices is None:
        raise FoldError("a missing operand")
    _limited((x.size // max(x.shape[axis], 1), indices.size))
    return np.take(x, indices.astype(np.int64), axis)


def _pad(operands: _Inputs, attributes: _Attributes) -> Array:
    x, pads = _first(operands), _numbers(operands, attributes, 1, "pads") or []
    if attributes.get("mode", b"constant") != b"constant" or len(pads) != 2 * x.ndim or min(pads, default=0) < 0:
        raise FoldError("Pad of another kind than with a constant, on all axes")
    value = operands[2] if len(operands) > 2 and operands[2] is not None else attributes.get("value", 0.0)
    before, after = pads[: x.ndim], pads[x.ndim :]
    _limited([d + b + a for d, b, a in zip(x.shape, before, after, strict=True)])
    return np.pad(x, list(zip(before, after, strict=True)), constant_values=np.asarray(value).item())


def _expand(operands: _Inputs, attributes: _Attributes) -> Array:
    x = _first(operands)
    shape = _limited(np.broadcast_shapes(x.shape, tuple(_numbers(operands, attributes, 1, "shape") or ())))
    return np.broadcast_to(x, shape).copy()


def _tile(operands: _Inputs, attributes: _Attributes) -> Array:
    x, repeats = _first(operands), _numbers(operands, attributes, 1, "repeats") or []
    _limited([d * r for d, r in zip(x.shape, repeats, strict=True)])
    return np.tile(x, repeats)


def _filled(operands: _Inputs, attributes: _Attributes) -> Array:
    shape = _limited([int(v) for v in _first(operands).reshape(-1)])
    value = attributes.get("value")
    fill = np.zeros(1, np.float32) if value is None else native_values(value, None)
    return np.full(shape, fill.reshape(-1)[0], fill.dtype)


def _range(operands: _Inputs, _: _Attributes) -> Array:
    start, limit, step = (float(_first([operand]).reshape(-1)[0]) for operand in operands)
    (count,) = _limited((max(0, math.ceil((limit - start) / step)),))
    return (start + step * np.arange(count)).astype(_first(operands).dtype)


def _cast(operands: _Inputs, attributes: _Attributes) -> Array:
    return _first(operands).astype(helper.tensor_dtype_to_np_dtype(int(attributes["to"])))


def _clip(operands: _Inputs, attributes: _Attributes) -> Array:
    low, high = (
        operands[i] if len(operands) > i and operands[i] is not None else attributes.get(key)
        for i, key in ((1, "min"), (2, "max"))
    )
    return np.clip(_first(operands), low, high)


def _where(operands: _Inputs, _: _Attributes) -> Array:
    condition, yes, no = operands
    if condition is None or yes is None or no is None:
        raise FoldError("a missing operand")
    _limited(np.broadcast_shapes(condition.shape, yes.shape, no.shape))
    return np.where(condition, yes, no)


def _product(operands: _Inputs, attributes: _Attributes) -> Array:
    a, b = _first(operands), operands[1]
    if b is None:
        raise FoldError("a missing operand")
    a, b = (a.T if attributes.get("transA") else a), (b.T if attributes.get("transB") else b)
    if min(a.ndim, b.ndim) < 2:
        raise FoldError("a product of vectors")
    _limited((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]))
    found: Array = np.matmul(a, b) * attributes.get("alpha", 1.0)
    if len(operands) > 2 and operands[2] is not None:
        found = found + operands[2] * attributes.get("beta", 1.0)
    return found


def _scaled(x: Array, scale: Array | None, zero: Array | None, attributes: _Attributes) -> tuple[Array, Array]:
    """Scale and zero point, in shapes that broadcast against the tensor's."""
    if scale is None or attributes.get("block_size"):
        raise FoldError("blocks of scales")
    shape = [1] * x.ndim
    if scale.size > 1:
        shape[int(attributes.get("axis", 1))] = scale.size
    zero = np.zeros(scale.shape, np.int64) if zero is None else zero.astype(np.int64)
    return scale.reshape(shape if scale.size > 1 else ()), zero.reshape(shape if zero.size > 1 else ())


def _dequantize(operands: _Inputs, attributes: _Attributes) -> Array:
    x, scale, zero = (*operands, None)[:3]
    if x is None or scale is None:
        raise FoldError("a missing operand")
    by, offset = _scaled(x, scale, zero, attributes)
    return ((x.astype(np.int64) - offset) * by).astype(scale.dtype)


def _quantize(operands: _Inputs, attributes: _Attributes) -> Array:
    x, scale, zero = (*operands, None)[:3]
    if x is None:
        raise FoldError("a missing operand")
    kind = np.dtype(np.uint8) if zero is None else zero.dtype
    if kind not in (np.int8, np.uint8, np.int16, np.uint16):
        raise FoldError(f"quantization to {kind}")
    by, offset = _scaled(x, scale, zero, attributes)
    rounded: Array = np.clip(np.rint(x / by) + offset, np.iinfo(kind).min, np.iinfo(kind).max).astype(kind)
    return rounded


# Their results have the type of their first operand; NumPy computes some of them in a wider one.
_ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "MatMul", "Gemm", "ReduceL2", "ReduceSum"}
_ARITHMETIC |= {"ReduceMean", "Clip", "Sqrt", "Reciprocal"}


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind in "iu":
        raise FoldError("a division of integers")
    return np.divide(a, b)


_OPERATORS: dict[str, Callable[[_Inputs, _Attributes], Array | tuple[Array, ...]]] = {
    "Identity": _unary(lambda x: x),
    "Neg": _unary(np.negative),
    "Abs": _unary(np.abs),
    "Sqrt": _unary(np.sqrt),
    "Exp": _unary(np.exp),
    "Log": _unary(np.log),
    "Tanh": _unary(np.tanh),
    "Sign": _unary(np.sign),
    "Round": _unary(np.rint),
    "Floor": _unary(np.floor),
    "Not": _unary(np.logical_not),
    "Relu": _unary(lambda x: np.maximum(x, x.dtype.type(0))),
    "Reciprocal": _unary(lambda x: 1 / x),
    "Sigmoid": _unary(lambda x: (1 / (1 + np.exp(-x))).astype(x.dtype)),
    "Shape": _unary(lambda x: np.array(x.shape, np.int64)),
    "Add": _broadcast(np.add),
    "Sum": _broadcast(np.add),
    "Sub": _broadcast(np.subtract),
    "Mul": _broadcast(np.multiply),
    "Div": _broadcast(_divide),
    "Pow": _broadcast(np.power),
    "Max": _broadcast(np.maximum),
    "Min": _broadcast(np.minimum),
    "Equal": _broadcast(np.equal),
    "Greater": _broadcast(np.greater),
    "GreaterOrEqual": _broadcast(np.greater_equal),
    "Less": _broadcast(np.less),
    "LessOrEqual": _broadcast(np.less_equal),
    "And": _broadcast(np.logical_and),
    "Or": _broadcast(np.logical_or),
    "ReduceSum": _reduce(np.sum),
    "ReduceMean": _reduce(np.mean),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "ReduceL2": _reduce(_norm),
    "ReduceSumSquare": _reduce(lambda x, **how: np.sum(np.square(x), **how)),
    "ReduceL1": _reduce(lambda x, **how: np.sum(np.abs(x), **how)),
    "Transpose": lambda operands, attributes: np.transpose(_first(operands), attributes.get("perm")),
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Flatten": _flatten,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Pad": _pad,
    "Expand": _expand,
    "Tile": _tile,
    "ConstantOfShape": _filled,
    "Range": _range,
    "Cast": _cast,
    "CastLike": lambda operands, _: _first(operands).astype(_first(operands[1:]).dtype),
    "Clip": _clip,
    "Where": _where,
    "MatMul": _product,
    "Gemm": _product,
    "DequantizeLinear": _dequantize,
    "QuantizeLinear": _quantize,
}
