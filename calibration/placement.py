"""Placement of Q/DQ pairs for TensorRT, decided from the graph alone, before any range is known.

The rules follow NVIDIA's placement recommendations for explicit quantization:

- The data input and the weight of every Conv, and of every Gemm and MatMul with a constant second operand, are quantized;
  biases stay float.
- The output of a layer is not quantized by default: a Q/DQ pair between a convolution and its BatchNorm, activation or
  residual addition would prevent their fusion. Of a residual addition only the skip connection is quantized; if both
  operands come from convolutions, the deeper one is fused and the other one is the skip connection.
- Operators that only move values (max pooling, reshapes, splits, concatenation, ...) have a pair before and a pair
  after them, with the same scale, if all readers of their output are quantized: the values pass through as INT8.
  Rounding twice with the same scale changes nothing. If there is another reader, the values are moved in float and
  quantized afterwards. Between two such operators there is a pair if a layer reads the value between them too.
- All inputs of a concatenation share one scale if any of them is quantized. With `quantize_outputs`, all readers of a
  pooling get its quantized output if one of them is a concatenation.
- Average pooling computes, so it ends such a path: its output is quantized if a layer reads it, its input only if a layer
  reads that too.
- A tensor with several readers is quantized once, and dequantized once for each reader.

Throughout, a place for a pair is an edge: a reader of a tensor, as (node index, input index). `place` builds the set of
edges in three steps: the data inputs of the layers and the skip connections; with `quantize_outputs`, the readers of
what the layers return; then it pushes edges from behind moving operators to before them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from maskplan.calibration.graph import STANDARD, Graph, attributes_of
from maskplan.exporters.metadata import opset_of
from maskplan.exporters.subgraphs import model_nodes
from maskplan.exporters.tensors import dtype_name
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.weight_ops import QUANTIZABLE_OPS, WEIGHT_OPS

MIN_OPSET = 13
"""The first opset whose DequantizeLinear has per-channel scales."""

_QUANTIZED_OPS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"}
_ADDITIONS = {"Add", "Sum"}
_ACTIVATIONS = {
    "Relu",
    "Clip",
    "LeakyRelu",
    "PRelu",
    "Elu",
    "Selu",
    "Celu",
    "ThresholdedRelu",
    "Sigmoid",
    "HardSigmoid",
}
_ACTIVATIONS |= {"HardSwish", "Tanh", "Softplus", "Softsign", "Mish", "Gelu", "Swish"}
_POOLINGS = {"MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"}
_ARITHMETIC = {"Add", "Sub", "Mul", "Div"}
# Nodes between a tensor and the product that gates it: x * clip(x + 3, 0, 6) / 6 has three.
_MAX_GATE_NODES = 4


@dataclass(frozen=True)
class PlaceOptions:
    """What to quantize.

    Attributes:
        exclude: Patterns (globs) of names of nodes or weights; these layers stay in float.
        quantize_outputs: Also quantize the output of a layer, behind the activation and addition that fuse with it, to
            allow kernels with INT8 inputs and outputs. Outputs of the graph stay float.
    """

    exclude: tuple[str, ...] = ()
    quantize_outputs: bool = False


@dataclass(frozen=True)
class Activation:
    """A tensor to quantize.

    Attributes:
        tensor: Its name.
        uses: The readers of the dequantized values: a node's name from `graph.node_names`, and the index of its input. All
            other readers keep the float tensor.
    """

    tensor: str
    uses: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class QuantizedWeight:
    """A constant to store as INT8, with a scale for each channel along `axis`, for input `input` of `node`."""

    tensor: str
    node: str
    input: int
    axis: int


@dataclass(frozen=True)
class Placement:
    """Where Q/DQ pairs go.

    Attributes:
        activations: In the order in which the graph produces them.
        weights: One for each quantized layer, in the order of the graph.
        tied: Groups of `activations` that must share one scale.
        in_float: Layers that stay in float, with the reason.
    """

    activations: tuple[Activation, ...]
    weights: tuple[QuantizedWeight, ...]
    tied: tuple[tuple[str, ...], ...]
    in_float: tuple[tuple[str, str], ...] = ()


def place(model: onnx.ModelProto, options: PlaceOptions | None = None) -> Placement:
    """Choose what to quantize in an FP32 graph; layers in subgraphs and local functions stay in float.

    Raises:
        InputError: The model has Q/DQ already, its opset is too old, a pattern matches no layer, or no layer can be
            quantized.
    """
    options = options or PlaceOptions()
    require_float_graph(model)
    graph = Graph(model.graph)
    layers = _with_exclusions(list(_layers(graph)), options.exclude)
    quantized = {layer.node: layer for layer in layers if layer.reason is None}
    fused = _fused_additions(graph, quantized)
    edges = {(node, 0) for node in quantized} | {(node, 1 - main) for node, main in fused.items()}
    if options.quantize_outputs:
        in_float = {layer.node for layer in layers if layer.reason is not None}
        edges |= _output_edges(graph, quantized, fused, in_float)
    edges |= _averages_beside_layers(graph, edges)
    moves = _quantized_moves(graph, edges)
    return Placement(
        tuple(_activations(graph, edges)),
        tuple(QuantizedWeight(layer.weight, graph.names[layer.node], 1, layer.axis) for layer in quantized.values()),
        tuple(_tied(graph, edges, moves)),
        tuple((graph.names[layer.node], layer.reason) for layer in layers if layer.reason is not None),
    )


def require_float_graph(model: onnx.ModelProto) -> None:
    """Raise unless Q/DQ can be inserted into a model.

    Raises:
        InputError: It has Q/DQ already, or its opset is too old.
    """
    require_unquantized(model)
    opset = opset_of(model)
    if opset < MIN_OPSET:
        raise InputError(
            "the model's opset is too old for Q/DQ",
            found=f"opset {opset}",
            fix=f"export it again with opset {MIN_OPSET} or later; INT8 with FP16 needs 19 or later",
        )


def require_unquantized(model: onnx.ModelProto) -> None:
    """Raise if a model has Q/DQ or quantized operators.

    Raises:
        InputError: It has; some are listed.
    """
    quantized_nodes = [
        f"{node.op_type} {node.name or node.output[0]}"
        for node in model_nodes(model)
        if node.op_type in _QUANTIZED_OPS or node.op_type.startswith("QLinear")
    ]
    if quantized_nodes:
        raise InputError(
            "the model is already quantized",
            found=listed(quantized_nodes, 3),
            fix="calibrate the FP32 model from which it was created",
        )


@dataclass(frozen=True)
class _Layer:
    node: int
    name: str
    weight: str
    axis: int
    reason: str | None = None


def _layers(graph: Graph) -> Iterator[_Layer]:
    """Every Conv, Gemm and MatMul, without products of two activations; `reason` is set if it cannot be quantized."""
    axes: dict[str, int] = {}
    for n, node in enumerate(graph.nodes):
        if node.op_type not in QUANTIZABLE_OPS or node.domain not in STANDARD:
            continue
        op, (data, weight) = WEIGHT_OPS[node.op_type], node.input[:2]
        tensor = graph.constants.get(weight)
        if tensor is None and not op.is_convolution:
            continue
        # Of products only a second operand of two axes is quantized, so a negative axis counts from two.
        axis, reason = op.operands[0].axes(attributes_of(node))[1] % 2, None
        if tensor is None:
            reason = "its weight is not constant"
        elif data in graph.constants:
            reason = "its input is constant"
        elif tensor.data_type != TensorProto.FLOAT:
            reason = f"its weight is {dtype_name(tensor.data_type)}, not float32"
        elif not op.is_convolution and len(tensor.dims) != 2:
            reason = f"its weight has {len(tensor.dims)} dimensions"
        elif weight in graph.read_elsewhere:
            reason = "its weight is also an output or read by a subgraph"
        elif axes.setdefault(weight, axis) != axis:
            reason = "its weight is quantized along another axis for another layer"
        yield _Layer(n, graph.names[n], weight, axis, reason)


def _with_exclusions(layers: list[_Layer], exclude: tuple[str, ...]) -> list[_Layer]:
    """The same layers, with a reason for those that the user excludes."""
    unmatched = [g for g in exclude if not any(_matches(layer, g) for layer in layers)]
    if unmatched:
        raise InputError(
            "patterns of layers to exclude match no layer",
            found=listed(unmatched),
            fix=f"choose from: {', '.join(layer.name for layer in layers) or 'the model has no layers'}",
        )
    marked = []
    for layer in layers:
        glob = next((g for g in exclude if _matches(layer, g)), None)
        reason = layer.reason if glob is None else f"excluded by {glob!r}"
        marked.append(_Layer(layer.node, layer.name, layer.weight, layer.axis, reason))
    if all(layer.reason is not None for layer in marked):
        raise InputError(
            "no layer can be quantized",
            found=listed((f"{layer.name}: {layer.reason}" for layer in marked), 3)
            or "no Conv, Gemm or MatMul outside of If, Loop and Scan",
            fix="give an FP32 model, or exclude fewer layers",
        )
    return marked


def _matches(layer: _Layer, glob: str) -> bool:
    return fnmatch.fnmatchcase(layer.name, glob) or fnmatch.fnmatchcase(layer.weight, glob)


def _fused_additions(graph: Graph, quantized: Mapping[int, _Layer]) -> dict[int, int]:
    """Residual additions that fuse with a quantized convolution, with the index of the input that comes from it."""
    # Layers on the longest path to a tensor.
    depth: dict[str, int] = {}
    fused = {}
    for n, node in enumerate(graph.nodes):
        deepest = max((depth.get(name, 0) for name in node.input), default=0) + (node.op_type in QUANTIZABLE_OPS)
        depth.update((name, deepest) for name in node.output)
        if node.op_type not in _ADDITIONS or len(set(node.input)) != 2 or len(node.input) != 2:
            continue
        if any(name in graph.constants for name in node.input):
            continue
        mains = [i for i, name in enumerate(node.input) if _convolution_behind(graph, name) in quantized]
        if mains:
            # Of two at the same depth the later one: when it runs, the other result exists.
            fused[n] = max(mains, key=lambda i: (depth[node.input[i]], graph.producers[node.input[i]]))
    return fused


def _convolution_behind(graph: Graph, tensor: str) -> int | None:
    """The convolution that produces a tensor, directly or through foldable nodes, without other readers."""
    while tensor in graph.producers and graph.only_reader(tensor):
        n = graph.producers[tensor]
        if graph.nodes[n].op_type == "Conv":
            return n
        if not _folds(graph, n):
            return None
        tensor = next(name for name in graph.nodes[n].input if name not in graph.constants)
    return None


def _folds(graph: Graph, n: int) -> bool:
    """Whether an engine folds a node into the layer before: BatchNorm, or arithmetic with a constant."""
    node = graph.nodes[n]
    if node.op_type == "BatchNormalization":
        return True
    return node.op_type in _ARITHMETIC and sum(name not in graph.constants for name in node.input) == 1


def _output_edges(
    graph: Graph, quantized: Iterable[int], fused: Mapping[int, int], in_float: set[int]
) -> set[tuple[int, int]]:
    """The edges that read the layers' outputs, except those of layers in float and of moves towards float readers."""
    # Edges that must not be quantized. Backward, so that a chain of moves that ends in float is found as a whole.
    closed = {(n, 0) for n in in_float}
    for n in reversed(range(len(graph.nodes))):
        node = graph.nodes[n]
        reaches_float = any(
            name in graph.read_elsewhere or any(edge in closed for edge in graph.readers.get(name, ()))
            for name in node.output
        )
        joins_constant = node.op_type == "Concat" and not graph.moves(n)
        if joins_constant or (reaches_float and graph.moves(n)):
            closed.update((n, i) for i in range(len(node.input)))
    edges = set()
    for layer in quantized:
        for n, i in graph.readers.get(_end_of_fusion(graph, layer, fused), ()):
            # An activation or addition that could not fuse with this layer computes in float.
            unfused = graph.nodes[n].op_type in _ACTIVATIONS or n in fused
            if (n, i) not in closed and not unfused and graph.nodes[n].op_type not in ("Shape", "Size"):
                edges.add((n, i))
    joined: set[int] = set()
    while concats := {n for n, _ in edges if graph.nodes[n].op_type == "Concat"} - joined:
        joined |= concats
        # Inputs of a concatenation share one scale, so all of them are quantized.
        inputs = {(n, i) for n in concats for i in graph.moved_inputs(n)}
        # If others read such an input in float, an engine computes a pooling twice.
        pooled = {graph.nodes[n].input[i] for n, i in inputs if _is_pooled(graph, graph.nodes[n].input[i])}
        others = {edge for name in pooled - graph.read_elsewhere for edge in graph.readers[name]}
        edges |= inputs | (others - closed)
    return edges


def _averages_beside_layers(graph: Graph, edges: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """The inputs of average poolings that a quantized layer reads too.

    Read in float they would need all that is before them in float as well, and an engine would compute it twice.
    """
    averages = {(n, 0) for n, node in enumerate(graph.nodes) if node.op_type == "AveragePool"}
    return {(n, i) for n, i in averages if any(edge in edges for edge in graph.readers[graph.nodes[n].input[i]])}


def _is_pooled(graph: Graph, tensor: str) -> bool:
    return tensor in graph.producers and graph.nodes[graph.producers[tensor]].op_type in _POOLINGS


def _end_of_fusion(graph: Graph, layer: int, fused: Mapping[int, int]) -> str:
    """The output of a layer with all that fuses into it: BatchNorm, a residual addition, an activation."""
    tensor: str = graph.nodes[layer].output[0]
    while (reader := graph.only_reader(tensor)) and _folds(graph, reader[0]):
        tensor = graph.nodes[reader[0]].output[0]
    if reader and fused.get(reader[0]) == reader[1]:
        tensor = graph.nodes[reader[0]].output[0]
        reader = graph.only_reader(tensor)
    if reader and graph.nodes[reader[0]].op_type in _ACTIVATIONS:
        return str(graph.nodes[reader[0]].output[0])
    return _gated(graph, tensor) or tensor


def _gated(graph: Graph, tensor: str) -> str | None:
    """The product of a tensor and a function of itself (SiLU, decomposed hard swish), if nothing else reads the tensor."""
    readers = {n for n, _ in graph.readers.get(tensor, ())}
    if len(readers) != 2 or tensor in graph.read_elsewhere:
        return None
    for first in readers:
        (product,) = readers - {first}
        n = first
        for _ in range(_MAX_GATE_NODES):
            if graph.nodes[n].op_type not in _ACTIVATIONS and not _folds(graph, n):
                break
            reader = graph.only_reader(graph.nodes[n].output[0])
            if reader is None:
                break
            n = reader[0]
            if n == product and graph.nodes[n].op_type == "Mul":
                gated: str = graph.nodes[n].output[0]
                after = graph.only_reader(gated)
                # The division by 6 of hard swish.
                divides = after is not None and graph.nodes[after[0]].op_type in ("Mul", "Div")
                return graph.nodes[after[0]].output[0] if after and divides and _folds(graph, after[0]) else gated
    return None


def _quantized_moves(graph: Graph, edges: set[tuple[int, int]]) -> set[int]:
    """Nodes that move INT8 values; adds the edges at the beginning of such paths to `edges`."""
    # Backward: whether a node can move INT8 depends on its readers.
    moves: set[int] = set()
    for n in reversed(range(len(graph.nodes))):
        outputs = [name for name in graph.nodes[n].output if name]
        readers = [edge for name in outputs for edge in graph.readers.get(name, ())]
        if not graph.moves(n) or not readers or graph.read_elsewhere.intersection(outputs):
            continue
        if all((r, i) in edges or (r in moves and i in graph.moved_inputs(r)) for r, i in readers):
            moves.add(n)
            if graph.nodes[n].op_type == "Concat":
                edges.update((n, i) for i in graph.moved_inputs(n))
    for n in moves:
        tensor = graph.nodes[n].input[0]
        # Between two moves the values are INT8 already, unless a layer reads them too: for that layer they are quantized,
        # and an engine that finds another reader without a pair computes the first move twice, or in float.
        if graph.producers.get(tensor) not in moves or any(edge in edges for edge in graph.readers[tensor]):
            edges.add((n, 0))
    return moves


def _activations(graph: Graph, edges: set[tuple[int, int]]) -> Iterator[Activation]:
    made = [name for node in graph.nodes for name in node.output]
    for tensor in (*graph.inputs, *made):
        uses = tuple((graph.names[n], i) for n, i in graph.readers.get(tensor, ()) if (n, i) in edges)
        if uses:
            yield Activation(tensor, uses)


def _tied(graph: Graph, edges: set[tuple[int, int]], moves: set[int]) -> Iterator[tuple[str, ...]]:
    """Groups of quantized tensors with one scale, in the order in which the graph produces them."""
    group_of: dict[str, set[str]] = {}

    # Union of overlapping groups: a tensor may belong to a concatenation and to a pooling behind it.
    def tie(tensors: Iterable[str]) -> None:
        merged = set[str]().union(*(group_of.get(tensor, {tensor}) for tensor in tensors))
        group_of.update((tensor, merged) for tensor in merged)

    for n, node in enumerate(graph.nodes):
        moved = [node.input[i] for i in graph.moved_inputs(n)] if n in moves or node.op_type == "Concat" else []
        if n in moves:
            tie([*moved, *(name for name in node.output if name)])
        elif moved and (n, 0) in edges:
            tie(moved)
    quantized = [a.tensor for a in _activations(graph, edges)]
    seen: set[str] = set()
    for tensor in quantized:
        if tensor not in seen:
            group = tuple(other for other in quantized if other in group_of.get(tensor, ()))
            seen.update(group)
            if len(group) > 1:
                yield group
