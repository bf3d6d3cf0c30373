"""Match the layers of two ONNX graphs: by weight name, node name, inputs, and order.

The graphs come from one network, but by different routes: another exporter (no or renumbered node names), a folded
BatchNormalization, FP16 (Cast nodes), INT8 (Q/DQ nodes), or other names of initializers. No single key survives all of
them, so that matching runs from the most to the least reliable key and propagates along the graph.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx

from maskplan.calibration.graph import Graph
from maskplan.exporters.subgraphs import subgraphs
from maskplan.exporters.weights import weight_uses
from maskplan.pipeline.core.artifacts import TensorSpec

# Ops that change how values are stored but not what they mean. INT8 and FP16 graphs have more of them: they are no layers.
_CONVERSIONS = {"QuantizeLinear", "DequantizeLinear", "Cast", "CastLike", "Identity", "Dropout"}


GRAPH_INPUT = ""
"""Stands for the graph's input, which the two graphs may name differently."""

# No ONNX tensor has this name, so that a layer with an unmatched input never equals a layer of the dense graph.
_UNKNOWN = "\0"


@dataclass(frozen=True)
class GraphLayer:
    """A node whose output depends on the graph's input.

    Attributes:
        name: The node's name; the name of its first output if the node's is missing or not unique.
        named: Whether the node has a unique name.
        op: ONNX op type.
        tensors: Its float outputs.
        weight: Name of the stored weight of a Conv, ConvTranspose, Gemm or MatMul.
        inputs: Computed input tensors, each traced back through conversions to a layer's output or to `GRAPH_INPUT`.
        batchnorm: Name of the BatchNormalization that is its only reader.
    """

    name: str
    named: bool
    op: str
    tensors: tuple[TensorSpec, ...]
    weight: str | None
    inputs: tuple[str, ...]
    batchnorm: str | None


@dataclass(frozen=True)
class LayerMatches:
    """Matched layers of two graphs.

    Attributes:
        pairs: The dense graph's layer, its output, and the matching output in the sparse graph, in the dense graph's order.
        unmatched: Names of the layers that only one graph has.
    """

    pairs: tuple[tuple[GraphLayer, TensorSpec, TensorSpec], ...]
    unmatched: tuple[str, ...]


def computed_tensors(graph: onnx.GraphProto) -> list[str]:
    """Outputs of the nodes that depend on the graph's input, without conversions, in graph order."""
    return [name for node in _computing(graph) if not _converts(node) for name in node.output if name]


def graph_layers(model: onnx.ModelProto, floats: Mapping[str, TensorSpec]) -> list[GraphLayer]:
    """The layers of a graph, in graph order.

    Args:
        model: The graph.
        floats: Types and shapes of its float tensors, by name; a node without a float output is no layer.
    """
    graph = Graph(model.graph)
    uses_of_name = Counter(node.name for node in graph.nodes)
    weights: dict[str, str] = {}
    for use in weight_uses(model):
        # A node name that occurs twice identifies no weight.
        weights[use.node] = "" if use.node in weights else use.name
    computed = {name for node in _computing(model.graph) for name in node.output if name}
    computed.update(name for name in graph.inputs if name not in graph.constants)
    layers = []
    for name, node in zip(graph.names, graph.nodes, strict=True):
        tensors = tuple(floats[t] for t in node.output if t in floats)
        if tensors and not _converts(node) and computed.issuperset(t.name for t in tensors):
            reader = graph.only_reader(node.output[0])
            normalizes = reader is not None and graph.nodes[reader[0]].op_type == "BatchNormalization"
            layers.append(
                GraphLayer(
                    name=name,
                    named=uses_of_name[node.name] == 1 and bool(node.name),
                    op=node.op_type,
                    tensors=tensors,
                    weight=weights.get(node.name or node.output[0]) or None,
                    inputs=tuple(_source(graph, t) for t in node.input if t in computed),
                    batchnorm=graph.names[reader[0]] if reader is not None and normalizes else None,
                )
            )
    return layers


def match_layers(dense: Sequence[GraphLayer], sparse: Sequence[GraphLayer]) -> LayerMatches:
    """Match the layers of two graphs.

    Layers with weights match by the weight's name, then by the node's name. Other layers match if they have the same op and
    matching inputs; the rest by node name, and finally by order, if both graphs have equally many of an op. Layers whose
    outputs differ in shape never match. If only one graph has the BatchNormalization after a convolution, because the other
    has it folded into the weights, the normalized output is compared.
    """
    matching = _Matching(dense, sparse)
    # Initializers keep the parameters' names through export, precision conversion and Q/DQ insertion.
    matching.by_key(lambda layer: layer.weight)
    matching.by_key(lambda layer: layer.name if layer.named and layer.weight is not None else None)
    # Before inputs are compared: what reads a folded convolution reads the BatchNormalization in the other graph.
    matching.fold_batchnorms()
    # The matched convolutions and the graph's input anchor the layers between them. Node names come later: exporters that
    # number their nodes use one name for different layers in different graphs (`Relu_3` after a BatchNormalization is gone).
    matching.by_inputs()
    matching.by_key(lambda layer: layer.name if layer.named else None)
    # Each newly matched layer may anchor others, so inputs are compared again after each weaker key.
    matching.by_inputs()
    matching.by_order()
    matching.by_inputs()
    return matching.result()


@dataclass
class _Matching:
    """Matches found so far; layers are given by their index in `dense` and `sparse`."""

    dense: Sequence[GraphLayer]
    sparse: Sequence[GraphLayer]
    # Index of a sparse layer to the index of its dense layer.
    dense_of: dict[int, int] = field(default_factory=dict)
    # Index of a convolution to the BatchNormalization after it that only its graph has: its output is the one compared.
    dense_end: dict[int, int] = field(default_factory=dict)
    sparse_end: dict[int, int] = field(default_factory=dict)

    def by_key(self, key: Callable[[GraphLayer], str | None]) -> None:
        """Match layers by a key that is unique among the unmatched layers of each graph."""
        firsts, seconds = (
            _unique(self.unmatched_dense(), self.dense, key),
            _unique(self.unmatched_sparse(), self.sparse, key),
        )
        for value, j in seconds.items():
            if value in firsts and self.compatible(firsts[value], j):
                self.dense_of[j] = firsts[value]

    def fold_batchnorms(self) -> None:
        """If only one graph normalizes a matched convolution's output, compare the normalized output."""
        firsts = {self.dense[i].name: i for i in self.unmatched_dense()}
        seconds = {self.sparse[j].name: j for j in self.unmatched_sparse()}
        for j, i in self.dense_of.items():
            a, b = self.dense[i].batchnorm, self.sparse[j].batchnorm
            if a in firsts and b is None:
                self.dense_end[i] = firsts[a]
            elif b in seconds and a is None:
                self.sparse_end[j] = seconds[b]

    def by_inputs(self) -> None:
        """Match layers with the same op and matching inputs, preferably of the same name, else in order.

        One pass in graph order is enough: a layer's inputs come before it, so their match is already known.
        """
        free = defaultdict(list)
        for i in self.unmatched_dense():
            free[self.dense[i].op, self.dense[i].inputs].append(i)
        # A tensor of the sparse graph to its name in the dense graph.
        dense_names = {GRAPH_INPUT: GRAPH_INPUT}
        unmatched = set(self.unmatched_sparse())
        for j, layer in enumerate(self.sparse):
            if j in unmatched and layer.inputs:
                readers = free[layer.op, tuple(dense_names.get(name, _UNKNOWN) for name in layer.inputs)]
                options = [i for i in readers if self.compatible(i, j)]
                if options:
                    self.dense_of[j] = next((i for i in options if self.dense[i].name == layer.name), options[0])
                    readers.remove(self.dense_of[j])
            dense_names.update((b.name, a.name) for a, b in self.tensors(j))

    def by_order(self) -> None:
        """Match the remaining layers of each op in order, if both graphs have equally many of them."""
        firsts, seconds = defaultdict(list), defaultdict(list)
        for i in self.unmatched_dense():
            firsts[self.dense[i].op].append(i)
        for j in self.unmatched_sparse():
            seconds[self.sparse[j].op].append(j)
        for op, numbers in seconds.items():
            if len(firsts[op]) == len(numbers):
                self.dense_of.update((j, i) for i, j in zip(firsts[op], numbers, strict=True) if self.compatible(i, j))

    def unmatched_dense(self) -> list[int]:
        matched = {*self.dense_of.values(), *self.dense_end.values()}
        return [i for i in range(len(self.dense)) if i not in matched]

    def unmatched_sparse(self) -> list[int]:
        matched = {*self.dense_of, *self.sparse_end.values()}
        return [j for j in range(len(self.sparse)) if j not in matched]

    def compatible(self, i: int, j: int) -> bool:
        """Whether two layers have the same op, and outputs of the same number and shapes."""
        a, b = self.dense[i], self.sparse[j]
        if a.op != b.op or len(a.tensors) != len(b.tensors):
            return False
        return all(_same_shape(x.shape, y.shape) for x, y in zip(a.tensors, b.tensors, strict=True))

    def tensors(self, j: int) -> list[tuple[TensorSpec, TensorSpec]]:
        """Matching outputs (dense, sparse) of a sparse layer; empty if it has no match."""
        if j not in self.dense_of:
            return []
        i = self.dense_of[j]
        first, second = self.dense[self.dense_end.get(i, i)], self.sparse[self.sparse_end.get(j, j)]
        return list(zip(first.tensors, second.tensors, strict=True))

    def result(self) -> LayerMatches:
        pairs = [
            (self.dense[i], a, b)
            for j, i in sorted(self.dense_of.items(), key=lambda p: p[1])
            for a, b in self.tensors(j)
        ]
        unmatched = [self.dense[i].name for i in self.unmatched_dense()] + [
            self.sparse[j].name for j in self.unmatched_sparse()
        ]
        return LayerMatches(tuple(pairs), tuple(unmatched))


def _unique(
    numbers: Sequence[int], layers: Sequence[GraphLayer], key: Callable[[GraphLayer], str | None]
) -> dict[str, int]:
    """Layers by key, for the keys that only one layer has."""
    found = defaultdict(list)
    for n in numbers:
        if (value := key(layers[n])) is not None:
            found[value].append(n)
    return {value: ns[0] for value, ns in found.items() if len(ns) == 1}


def _same_shape(a: tuple[int | None, ...], b: tuple[int | None, ...]) -> bool:
    """Whether shapes are equal, except for the batch axis and for sizes that are known only at run time."""
    return len(a) == len(b) and all(None in (x, y) or x == y for x, y in zip(a[1:], b[1:], strict=True))


def _converts(node: onnx.NodeProto) -> bool:
    return node.op_type in _CONVERSIONS


def _computing(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that depend on the graph's input; a node with a subgraph always counts, since it may read any tensor."""
    constants = {tensor.name for tensor in graph.initializer}
    known = {value.name for value in graph.input if value.name not in constants}
    nodes = []
    for node in graph.node:
        if known.intersection(node.input) or any(True for _ in subgraphs(node)):
            nodes.append(node)
            known.update(name for name in node.output if name)
    return nodes


def _source(graph: Graph, tensor: str) -> str:
    """The tensor that this one is converted from; `GRAPH_INPUT` if no node computes it."""
    while tensor in graph.producers and _converts(graph.nodes[graph.producers[tensor]]):
        tensor = graph.nodes[graph.producers[tensor]].input[0]
    return tensor if tensor in graph.producers else GRAPH_INPUT
