"""Reading an ONNX graph: who makes a tensor, who reads it, and which operators only move values."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TensorProto, helper

from maskplan.exporters.subgraphs import subgraphs, walk_nodes

STANDARD = ("", "ai.onnx")
"""The domain of ONNX's own operators."""

# Operators whose results are values of their first input.
_MOVES = {"MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "GatherND"}
_MOVES |= {"Identity", "Expand", "Tile", "DepthToSpace", "SpaceToDepth"}


class Graph:
    """Who makes and who reads each tensor of the outermost graph.

    Attributes:
        nodes: In the order of the graph; everything else speaks of them by number.
        names: Of the nodes, as `node_names` has them.
        constants: Initializers and Constant nodes, by name.
        inputs: Names of the graph's inputs.
        seen_outside: Tensors that the caller gets or a subgraph reads: these are wanted as they are.
        makers: The node that makes a tensor.
        readers: The nodes that read a tensor, each with the index of its input.
    """

    def __init__(self, proto: onnx.GraphProto) -> None:
        self.nodes = list(proto.node)
        self.names = node_names(proto)
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in proto.initializer}
        self.inputs = [value.name for value in proto.input]
        self.seen_outside = {value.name for value in proto.output}
        self.makers: dict[str, int] = {}
        self.readers: dict[str, list[tuple[int, int]]] = {}
        for n, node in enumerate(self.nodes):
            self.makers.update((name, n) for name in node.output if name)
            for i, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((n, i))
            self.seen_outside.update(_captured(node))
            if node.op_type == "Constant" and isinstance(value := attributes_of(node).get("value"), TensorProto):
                self.constants[node.output[0]] = value

    def only_reader(self, tensor: str) -> tuple[int, int] | None:
        """The node and input that read a tensor which nothing else reads."""
        readers = self.readers.get(tensor, [])
        return readers[0] if len(readers) == 1 and tensor not in self.seen_outside else None

    def moves(self, n: int) -> bool:
        """Whether the values of a node's result are those of its inputs."""
        node = self.nodes[n]
        if node.domain not in STANDARD:
            return False
        if node.op_type == "Concat":
            return not any(name in self.constants for name in node.input)
        if node.op_type == "Resize":
            return bool(attributes_of(node).get("mode", b"nearest") == b"nearest")
        return node.op_type in _MOVES and node.input[0] not in self.constants

    def moved_inputs(self, n: int) -> list[int]:
        """Which inputs of a node that moves values hold the values."""
        return list(range(len(self.nodes[n].input))) if self.nodes[n].op_type == "Concat" else [0]


def node_names(graph: onnx.GraphProto) -> list[str]:
    """What to call each node of a graph: its name or, where that is missing or not its own, its first output's."""
    count: dict[str, int] = {}
    for node in graph.node:
        count[node.name] = count.get(node.name, 0) + 1
    return [n.name if n.name and count[n.name] == 1 else (n.output[0] if n.output else n.op_type) for n in graph.node]


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _captured(node: onnx.NodeProto) -> set[str]:
    """Names that the node's subgraphs read or return, be they theirs or not."""
    captured: set[str] = set()
    for graph in subgraphs(node):
        captured.update(value.name for value in graph.output)
        captured.update(name for inner in walk_nodes(graph.node) for name in inner.input)
    return captured
