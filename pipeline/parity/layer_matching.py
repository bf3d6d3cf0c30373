"""Which layers of two ONNX graphs are the same: by name, by weight, by what they read, by their order."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx

from maskplan.calibration.graph import Graph
from maskplan.exporters.subgraphs import subgraphs
from maskplan.exporters.weights import weight_uses
from maskplan.pipeline.core.artifacts import TensorSpec

# What changes how values are stored, not what they stand for: INT8 and FP16 graphs have more of these.
_CONVERSIONS = {"QuantizeLinear", "DequantizeLinear", "Cast", "CastLike", "Identity", "Dropout"}


IMAGE = ""
"""What the graph's input is called here, whatever it is called there."""

# No tensor has this name: ONNX keeps names free of it.
_UNKNOWN = "\0"


@dataclass(frozen=True)
class GraphLayer:
    """A node that computes from the image.

    Attributes:
        name: Its own, or where that is missing or not its own, its first output's.
        named: Whether the name is its own.
        op: Its ONNX op.
        tensors: The outputs that are floats.
        weight: Name of the stored weight of a Conv, ConvTranspose, Gemm or MatMul.
        reads: The tensors it computes from, each traced back through conversions to a layer's output or to `IMAGE`.
        normalized: The BatchNormalization that alone reads it, by name.
    """

    name: str
    named: bool
    op: str
    tensors: tuple[TensorSpec, ...]
    weight: str | None
    reads: tuple[str, ...]
    normalized: str | None


@dataclass(frozen=True)
class LayerMatches:
    """Pairs of the same tensor in both graphs, with the layer of the first that makes it, in the order of the first graph.

    `unmatched` names the layers that only one of them has.
    """

    pairs: tuple[tuple[GraphLayer, TensorSpec, TensorSpec], ...]
    unmatched: tuple[str, ...]


def computed_tensors(graph: onnx.GraphProto) -> list[str]:
    """Outputs of the nodes that compute from the graph's input, conversions left out, in the order of the graph."""
    return [name for node in _computing(graph) if not _converts(node) for name in node.output if name]


def graph_layers(model: onnx.ModelProto, floats: Mapping[str, TensorSpec]) -> list[GraphLayer]:
    """The layers of a graph in its order.

    Args:
        model: The graph.
        floats: What its tensors of floats are, by name; a node that makes none of them is no layer.
    """
    graph = Graph(model.graph)
    own = Counter(node.name for node in graph.nodes)
    weights: dict[str, str] = {}
    for use in weight_uses(model):
        # A name that several nodes bear tells nothing.
        weights[use.node] = "" if use.node in weights else use.name
    computed = {name for node in _computing(model.graph) for name in node.output if name}
    computed.update(name for name in graph.inputs if name not in graph.constants)
    layers = []
    for name, node in zip(graph.names, graph.nodes, strict=True):
        tensors = tuple(floats[t] for t in node.output if t in floats)
        if tensors and not _converts(node) and computed.issuperset(t.name for t in tensors):
            reader = graph.only_reader(node.output[0])
            normalized = reader is not None and graph.nodes[reader[0]].op_type == "BatchNormalization"
            layers.append(
                GraphLayer(
                    name=name,
                    named=own[node.name] == 1 and bool(node.name),
                    op=node.op_type,
                    tensors=tensors,
                    weight=weights.get(node.name or node.output[0]) or None,
                    reads=tuple(_source(graph, t) for t in node.input if t in computed),
                    normalized=graph.names[reader[0]] if reader is not None and normalized else None,
                )
            )
    return layers


def match_layers(dense: Sequence[GraphLayer], sparse: Sequence[GraphLayer]) -> LayerMatches:
    """Find the same layers in two graphs.

    Layers with weights are told by the weight's name, or else by their own. Others of one op are the same if they read the
    same; what is left is told by name, and at last by order, where both graphs have as many of an op. A name alone
    is no proof: exporters that number their nodes call other layers by it in other graphs. Layers whose outputs differ in
    shape are never the same. Where only one graph has the BatchNormalization behind a convolution, because it is folded into
    the weights of the other, the normalized output is the one compared.
    """
    found = _Matching(dense, sparse)
    found.by(lambda layer: layer.weight)
    found.by(lambda layer: layer.name if layer.named and layer.weight is not None else None)
    found.fold()
    found.by_reading()
    found.by(lambda layer: layer.name if layer.named else None)
    # What reads the layers that are known only now.
    found.by_reading()
    found.by_order()
    found.by_reading()
    return found.result()


@dataclass
class _Matching:
    """Pairs as they are found; layers by their place."""

    dense: Sequence[GraphLayer]
    sparse: Sequence[GraphLayer]
    # Of a sparse layer's number, the dense layer's.
    of: dict[int, int] = field(default_factory=dict)
    # What stands for a convolution that is normalized in its graph only.
    dense_end: dict[int, int] = field(default_factory=dict)
    sparse_end: dict[int, int] = field(default_factory=dict)

    def by(self, key: Callable[[GraphLayer], str | None]) -> None:
        """Pair the layers that have a key which no other free layer of their graph has."""
        firsts, seconds = _unique(self.free_dense(), self.dense, key), _unique(self.free_sparse(), self.sparse, key)
        for value, j in seconds.items():
            if value in firsts and self.fit(firsts[value], j):
                self.of[j] = firsts[value]

    def fold(self) -> None:
        """Where only one graph normalizes a convolution's output, take that output in its place."""
        firsts = {self.dense[i].name: i for i in self.free_dense()}
        seconds = {self.sparse[j].name: j for j in self.free_sparse()}
        for j, i in self.of.items():
            a, b = self.dense[i].normalized, self.sparse[j].normalized
            if a in firsts and b is None:
                self.dense_end[i] = firsts[a]
            elif b in seconds and a is None:
                self.sparse_end[j] = seconds[b]

    def by_reading(self) -> None:
        """Pair the layers of one op that read the same: those of one name, or else in order."""
        free = defaultdict(list)
        for i in self.free_dense():
            free[self.dense[i].op, self.dense[i].reads].append(i)
        # What the dense graph calls a tensor of the sparse one.
        called = {IMAGE: IMAGE}
        waiting = set(self.free_sparse())
        for j, layer in enumerate(self.sparse):
            if j in waiting and layer.reads:
                readers = free[layer.op, tuple(called.get(name, _UNKNOWN) for name in layer.reads)]
                options = [i for i in readers if self.fit(i, j)]
                if options:
                    self.of[j] = next((i for i in options if self.dense[i].name == layer.name), options[0])
                    readers.remove(self.of[j])
            called.update((b.name, a.name) for a, b in self.tensors(j))

    def by_order(self) -> None:
        """Pair what is left of each op, where both graphs have as many."""
        firsts, seconds = defaultdict(list), defaultdict(list)
        for i in self.free_dense():
            firsts[self.dense[i].op].append(i)
        for j in self.free_sparse():
            seconds[self.sparse[j].op].append(j)
        for op, numbers in seconds.items():
            if len(firsts[op]) == len(numbers):
                self.of.update((j, i) for i, j in zip(firsts[op], numbers, strict=True) if self.fit(i, j))

    def free_dense(self) -> list[int]:
        taken = {*self.of.values(), *self.dense_end.values()}
        return [i for i in range(len(self.dense)) if i not in taken]

    def free_sparse(self) -> list[int]:
        taken = {*self.of, *self.sparse_end.values()}
        return [j for j in range(len(self.sparse)) if j not in taken]

    def fit(self, i: int, j: int) -> bool:
        """Whether two layers may be the same."""
        a, b = self.dense[i], self.sparse[j]
        if a.op != b.op or len(a.tensors) != len(b.tensors):
            return False
        return all(_fit_in_shape(x.shape, y.shape) for x, y in zip(a.tensors, b.tensors, strict=True))

    def tensors(self, j: int) -> list[tuple[TensorSpec, TensorSpec]]:
        """The same tensors that a sparse layer stands for, if any."""
        if j not in self.of:
            return []
        i = self.of[j]
        first, second = self.dense[self.dense_end.get(i, i)], self.sparse[self.sparse_end.get(j, j)]
        return list(zip(first.tensors, second.tensors, strict=True))

    def result(self) -> LayerMatches:
        pairs = [
            (self.dense[i], a, b) for j, i in sorted(self.of.items(), key=lambda p: p[1]) for a, b in self.tensors(j)
        ]
        lonely = [self.dense[i].name for i in self.free_dense()] + [self.sparse[j].name for j in self.free_sparse()]
        return LayerMatches(tuple(pairs), tuple(lonely))


def _unique(
    numbers: Sequence[int], layers: Sequence[GraphLayer], key: Callable[[GraphLayer], str | None]
) -> dict[str, int]:
    """Layers by their keys, where one alone has it."""
    found = defaultdict(list)
    for n in numbers:
        if (value := key(layers[n])) is not None:
            found[value].append(n)
    return {value: ns[0] for value, ns in found.items() if len(ns) == 1}


def _fit_in_shape(a: tuple[int | None, ...], b: tuple[int | None, ...]) -> bool:
    """Whether shapes are the same but for the first axis, the batch, and for what only a run can tell."""
    return len(a) == len(b) and all(None in (x, y) or x == y for x, y in zip(a[1:], b[1:], strict=True))


def _converts(node: onnx.NodeProto) -> bool:
    return node.op_type in _CONVERSIONS


def _computing(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that depend on the graph's input; one with a subgraph may read anything."""
    constants = {tensor.name for tensor in graph.initializer}
    known = {value.name for value in graph.input if value.name not in constants}
    nodes = []
    for node in graph.node:
        if known.intersection(node.input) or any(True for _ in subgraphs(node)):
            nodes.append(node)
            known.update(name for name in node.output if name)
    return nodes


def _source(graph: Graph, tensor: str) -> str:
    """The tensor that conversions made this one of."""
    while tensor in graph.producers and _converts(graph.nodes[graph.producers[tensor]]):
        tensor = graph.nodes[graph.producers[tensor]].input[0]
    return tensor if tensor in graph.producers else IMAGE
