"""An ONNX graph by producers and readers of its tensors, and which operators only move values."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TensorProto, helper

from maskplan.exporters.subgraphs import subgraphs, walk_nodes

STANDARD = ("", "ai.onnx")
"""The domain of ONNX's own operators."""

# Operators whose outputs are values of their first input.
_MOVING_OPS = {
    "MaxPool",
    "Flatten",
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Split",
    "Gather",
    "GatherND",
}
_MOVING_OPS |= {"Identity", "Expand", "Tile", "DepthToSpace", "SpaceToDepth"}


class Graph:
    """Producers and readers of each tensor of the main graph.

    Attributes:
        nodes: In the order of the graph; all else refers to them by index.
        names: Of the nodes, from `node_names`.
        constants: Initializers and Constant nodes, by name.
        inputs: Names of the graph's inputs.
        read_elsewhere: Tensors that are outputs of the graph or that a subgraph reads; their values must not change.
        producers: The node that produces a tensor.
        readers: The nodes that read a tensor, each with the index of its input.
    """

    def __init__(self, proto: onnx.GraphProto) -> None:
        self.nodes = list(proto.node)
        self.names = node_names(proto)
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in proto.initializer}
        self.inputs = [value.name for value in proto.input]
        self.read_elsewhere = {value.name for value in proto.output}
        self.producers: dict[str, int] = {}
        self.readers: dict[str, list[tuple[int, int]]] = {}
        for n, node in enumerate(self.nodes):
            self.producers.update((name, n) for name in node.output if name)
            for i, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((n, i))
            self.read_elsewhere.update(_read_by_subgraphs(node))
            if node.op_type == "Constant" and isinstance(value := attributes_of(node).get("value"), TensorProto):
                self.constants[node.output[0]] = value

    def only_reader(self, tensor: str) -> tuple[int, int] | None:
        """The node and input index that read a tensor, if they are the only ones; else None."""
        readers = self.readers.get(tensor, [])
        return readers[0] if len(readers) == 1 and tensor not in self.read_elsewhere else None

    def moves(self, n: int) -> bool:
        """Whether a node only moves values: its outputs consist of values of its inputs."""
        node = self.nodes[n]
        if node.domain not in STANDARD:
            return False
        if node.op_type == "Concat":
            return not any(name in self.constants for name in node.input)
        if node.op_type == "Resize":
            return bool(attributes_of(node).get("mode", b"nearest") == b"nearest")
        return node.op_type in _MOVING_OPS and node.input[0] not in self.constants

    def moved_inputs(self, n: int) -> list[int]:
        """The inputs of a moving node whose values it moves; the others are shapes, indices and the like."""
        return list(range(len(self.nodes[n].input))) if self.nodes[n].op_type == "Concat" else [0]


def node_names(graph: onnx.GraphProto) -> list[str]:
    """A unique name for each node of a graph: its own or, if that is missing or repeated, that of its first output."""
    count: dict[str, int] = {}
    for node in graph.node:
        count[node.name] = count.get(node.name, 0) + 1
    return [n.name if n.name and count[n.name] == 1 else (n.output[0] if n.output else n.op_type) for n in graph.node]


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _read_by_subgraphs(node: onnx.NodeProto) -> set[str]:
    """Names that the node's subgraphs read or return, from any scope."""
    captured: set[str] = set()
    for graph in subgraphs(node):
        captured.update(value.name for value in graph.output)
        captured.update(name for inner in walk_nodes(graph.node) for name in inner.input)
    return captured
