"""Which tensors of an ONNX graph its weights multiply, and those tensors unfolded to rows as a weight sees them.

A row is what one output position is computed from: kernel positions outermost, channels innermost, as
`masking.layerwise.unfold_weight` orders a weight's columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.scopes import Scope
from maskplan.exporters.tensors import Array
from maskplan.exporters.weights import WeightUse, weight_nodes

QUANTIZED = "its values are quantized"
IN_LOOP = "its inputs are in a Loop, a Scan or a function and cannot be read out"
COMPUTED_SHAPE = "it is a batch of matrices"
TWO_LAYOUTS = "nodes read it in two layouts"

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)

# The If nodes around a node, outermost first, each with the name of the branch that the node is in.
Path = tuple[tuple[onnx.NodeProto, str], ...]


@dataclass(frozen=True)
class LayerCall:
    """One node that multiplies a weight with its input.

    Attributes:
        node: The node.
        scope: Where its names are visible.
        path: The branches of If that it is in.
        use: How it reads the weight.
        attributes: The node's, by name.
        source: Name of the input.
    """

    node: onnx.NodeProto
    scope: Scope
    path: Path
    use: WeightUse
    attributes: Mapping[str, Any]
    source: str


@dataclass(frozen=True)
class ObservedLayer:
    """A weight whose inputs can be read out while the graph runs.

    Attributes:
        name: Of the stored tensor.
        tensor: The stored tensor.
        position: Among the graph's weights, in the order in which nodes first use them.
        shape: (K, C, R, S) or (K, C), as its operator multiplies it.
        calls: The nodes that use it.
    """

    name: str
    tensor: TensorProto
    position: int
    shape: tuple[int, ...]
    calls: tuple[LayerCall, ...]

    @property
    def columns(self) -> int:
        """Length of a row of inputs: R*S*C."""
        return int(np.prod(self.shape[1:]))

    def weight(self, stored: Array) -> Array:
        """The stored values, (K, C, ...); a copy."""
        matrix: Array = stored.reshape(-1)[_positions(self.calls[0])]
        return matrix

    def stored(self, weight: Array) -> Array:
        """The inverse of `weight`: values (K, C, ...) in the layout of the stored tensor."""
        values = np.empty(weight.size, weight.dtype)
        values[_positions(self.calls[0]).reshape(-1)] = weight.reshape(-1)
        return values.reshape(tuple(self.tensor.dims))


def observed_layers(
    model: onnx.ModelProto, wanted: Collection[int], m: int
) -> tuple[tuple[ObservedLayer, ...], dict[int, str]]:
    """The weights whose inputs can be observed, in the order of the graph, and why the others cannot, by tensor.

    Args:
        model: The graph; the layers refer to its nodes and tensors.
        wanted: The `id` of each tensor to observe.
        m: Group length.

    Returns:
        The layers, and the reason of every other wanted tensor by its `id`.
    """
    # In lists, so that no object's `id` is given to another one while it is needed.
    places = list(_places(model.graph, ()))
    paths = {id(node): path for node, path in places}
    found = list(weight_nodes(model, m))
    calls: dict[int, list[LayerCall]] = {}
    positions: dict[int, int] = {}
    reasons: dict[int, str] = {}
    for node, scope, use in found:
        key = id(use.tensor if use.tensor is not None else node)
        positions.setdefault(key, len(positions))
        if use.tensor is None or key not in wanted:
            continue
        path = paths.get(id(node))
        if path is None:
            reasons[key] = IN_LOOP
        elif use.zero_point is not None or use.tensor.data_type not in _FLOATS:
            reasons[key] = QUANTIZED
        else:
            source = node.input[1 - use.operand]
            calls.setdefault(key, []).append(LayerCall(node, scope, path, use, scope.attributes(node), source))
    layers = []
    for key, same in calls.items():
        if key in reasons:
            continue
        shapes = [_layer_shape(call) for call in same]
        if None in shapes:
            reasons[key] = COMPUTED_SHAPE
        elif any(s != shapes[0] for s in shapes) or not all(_has_same_layout(same[0], c) for c in same[1:]):
            reasons[key] = TWO_LAYOUTS
        else:
            tensor, shape = same[0].use.tensor, shapes[0]
            assert tensor is not None
            assert shape is not None
            layers.append(ObservedLayer(same[0].use.name, tensor, positions[key], shape, tuple(same)))
    return tuple(sorted(layers, key=lambda layer: layer.position)), reasons


def _places(graph: onnx.GraphProto, path: Path) -> Iterator[tuple[onnx.NodeProto, Path]]:
    """Every node that runs at most once, with the branches that it is in."""
    for node in graph.node:
        yield node, path
        for attribute in node.attribute if node.op_type == "If" else ():
            if attribute.HasField("g"):
                yield from _places(attribute.g, (*path, (node, attribute.name)))


def _operand(call: LayerCall, flat: Array) -> Array:
    """Stored values as the node's operand."""
    assert call.use.tensor is not None
    value = flat.reshape(tuple(call.use.tensor.dims))
    for move in call.use.moves:
        value = value.reshape(move.shape) if move.perm is None else value.transpose(move.perm)
    return value


def _positions(call: LayerCall) -> npt.NDArray[np.int64]:
    """Where each element of the weight (K, C, ...) is in the stored tensor."""
    assert call.use.tensor is not None
    operand = _operand(call, np.arange(int(np.prod(call.use.tensor.dims)), dtype=np.int64))
    if call.use.op == "Conv":
        return operand
    matrix = operand.reshape(operand.shape[-2:])
    return matrix.T if _is_outputs_last(call) else matrix


def _is_outputs_last(call: LayerCall) -> bool:
    """Whether the operand of a product is (C, K)."""
    if call.use.op == "MatMul":
        return call.use.operand == 1
    return (call.use.operand == 1) != bool(call.attributes.get("transB" if call.use.operand == 1 else "transA"))


def _layer_shape(call: LayerCall) -> tuple[int, ...] | None:
    """(K, C, ...) of a weight; None of a batch of matrices."""
    assert call.use.tensor is not None
    shape = call.use.moves[-1].shape if call.use.moves else tuple(call.use.tensor.dims)
    if call.use.op == "Conv":
        return shape
    if np.prod(shape[:-2]) != 1:
        return None
    return (shape[-1], shape[-2]) if _is_outputs_last(call) else (shape[-2], shape[-1])


def _has_same_layout(a: LayerCall, b: LayerCall) -> bool:
    return (a.use.moves == b.use.moves and _is_outputs_last(a) == _is_outputs_last(b)) or np.array_equal(
        _positions(a), _positions(b)
    )


def unfolded_shape(call: LayerCall, layer: ObservedLayer, x: Array) -> tuple[int, int]:
    """Samples and output positions of each that an input has."""
    if call.use.op == "Conv":
        return len(x), int(np.prod(_windows(call, layer, x.shape[2:])[1]))
    rows = _matrix_rows(call, x)
    return rows.shape[0], rows.shape[1]


def unfold(call: LayerCall, layer: ObservedLayer, x: Array, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Rows of an input at some output positions.

    Args:
        call: The node.
        layer: The weight that it uses.
        x: The input, (N, C, H, W) of a convolution.
        chosen: Indices of output positions, of those that `unfolded_shape` counts.

    Returns:
        (N, positions, R*S*C) float32.
    """
    if call.use.op != "Conv":
        return np.ascontiguousarray(_matrix_rows(call, x)[:, chosen], np.float32)
    pads, sizes = _windows(call, layer, x.shape[2:])
    if any(itertools.chain(*pads)):
        x = np.pad(x, ((0, 0), (0, 0), *pads))
    kernel, lengths = layer.shape[2:], x.shape[2:]
    strides, dilations = _sized(call, "strides", kernel), _sized(call, "dilations", kernel)
    taps = np.array(list(itertools.product(*(range(k) for k in kernel))))
    corners = np.unravel_index(chosen, sizes)
    axes = zip(corners, strides, dilations, strict=True)
    index = [c[:, None] * stride + taps[:, axis] * dilation for axis, (c, stride, dilation) in enumerate(axes)]
    flat = np.ravel_multi_index(index, lengths)
    picked = x.reshape(len(x), x.shape[1], -1).take(flat, axis=2)
    return np.ascontiguousarray(np.moveaxis(picked, 1, -1), np.float32).reshape(len(x), len(chosen), -1)


def _matrix_rows(call: LayerCall, x: Array) -> Array:
    """The input of a product as (N, positions, C)."""
    if call.use.op == "Gemm":
        is_transposed = bool(call.attributes.get("transA" if call.use.operand == 1 else "transB"))
        # A is (N, C) unless transposed, B is (C, N) unless transposed.
        x = x.T if is_transposed == (call.use.operand == 1) else x
    elif call.use.operand == 0 and x.ndim > 1:
        x = np.moveaxis(x, -2, -1)
    x = x.reshape(1, -1) if x.ndim == 1 else x
    return x.reshape(len(x), -1, x.shape[-1])


def _windows(
    call: LayerCall, layer: ObservedLayer, lengths: Sequence[int]
) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
    """Padding before and after each axis, and the number of output positions along it."""
    kernel = layer.shape[2:]
    strides, dilations = _sized(call, "strides", kernel), _sized(call, "dilations", kernel)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    how = call.attributes.get("auto_pad", b"NOTSET")
    how = how.decode() if isinstance(how, bytes) else how
    if how in ("SAME_UPPER", "SAME_LOWER"):
        pads = []
        for length, stride, span in zip(lengths, strides, spans, strict=True):
            total = max((-(-length // stride) - 1) * stride + span - length, 0)
            first = total // 2 if how == "SAME_UPPER" else total - total // 2
            pads.append((first, total - first))
    else:
        given = list(call.attributes.get("pads", ())) if how != "VALID" else []
        given = given or [0] * (2 * len(kernel))
        pads = list(zip(given[: len(kernel)], given[len(kernel) :], strict=True))
    sizes = tuple(
        (length + sum(pad) - span) // stride + 1
        for length, pad, span, stride in zip(lengths, pads, spans, strides, strict=True)
    )
    return pads, sizes


def _sized(call: LayerCall, name: str, kernel: Sequence[int]) -> list[int]:
    return list(call.attributes.get(name, ())) or [1] * len(kernel)


def observed_graph(model: onnx.ModelProto, calls: Sequence[LayerCall]) -> tuple[bytes, dict[int, str]]:
    """A copy of a graph whose outputs are the inputs of some nodes; the model itself is not changed.

    Values inside the branches of If become outputs of the If nodes. Where another branch runs, such an output is empty.

    Args:
        model: The graph.
        calls: Nodes of it.

    Returns:
        The serialized graph, and for each call (by its place in `calls`) the name of the output or input that it reads.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    inputs = {value.name for value in copy.graph.input}
    names, outputs = {}, dict[str, None]()
    hoisted: dict[tuple[str, ...], str] = {}
    for number, call in enumerate(calls):
        graphs = _graphs_along(copy.graph, model.graph, call.path)
        depth = next((d for d in reversed(range(len(graphs))) if _defines(graphs[d][0], call.source)), 0)
        key = (*(f"{id(node)}:{branch}" for node, branch in call.path[:depth]), call.source)
        if key not in hoisted:
            hoisted[key] = _hoist(graphs[: depth + 1], call, len(hoisted)) if depth else call.source
        names[number] = hoisted[key]
        if names[number] not in inputs:
            outputs[names[number]] = None
    if outputs:
        del copy.graph.output[:]
        # ONNX Runtime infers the types.
        copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return copy.SerializeToString(), names


_Graphs = list[tuple[onnx.GraphProto, onnx.NodeProto | None, str]]


def _graphs_along(copied: onnx.GraphProto, original: onnx.GraphProto, path: Path) -> _Graphs:
    """The copied graphs from the outermost to that of a node, each with the If node that holds it and its branch."""
    graphs: _Graphs = [(copied, None, "")]
    for node, branch in path:
        index = next(i for i, other in enumerate(original.node) if other is node)
        twin = graphs[-1][0].node[index]
        graphs.append((_branch(twin, branch), twin, branch))
        original = _branch(node, branch)
    return graphs


def _branch(node: onnx.NodeProto, name: str) -> onnx.GraphProto:
    return next(attribute.g for attribute in node.attribute if attribute.name == name)


def _defines(graph: onnx.GraphProto, name: str) -> bool:
    return any(name in node.output for node in graph.node)


def _hoist(graphs: _Graphs, call: LayerCall, number: int) -> str:
    """Pass a value of the innermost graph on as an output of each If around it; returns its name outside."""
    assert call.use.tensor is not None
    empty = numpy_helper.from_array(np.empty(0, _native(call.use.tensor.data_type)))
    name = call.source
    for depth in range(len(graphs) - 1, 0, -1):
        graph, node, branch = graphs[depth]
        assert node is not None
        outer = f"maskplan_observed_{number}_{depth}"
        for attribute in node.attribute:
            if attribute.name == branch:
                graph.output.append(onnx.ValueInfoProto(name=name))
            elif attribute.HasField("g"):
                other = f"{outer}_{attribute.name}"
                attribute.g.node.append(helper.make_node("Constant", [], [other], value=empty))
                attribute.g.output.append(onnx.ValueInfoProto(name=other))
        node.output.append(outer)
        name = outer
    return name


def _native(data_type: int) -> np.dtype[Any]:
    native: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(data_type)
    return np.zeros(0, ml_dtypes.bfloat16).dtype if data_type == TensorProto.BFLOAT16 else native
