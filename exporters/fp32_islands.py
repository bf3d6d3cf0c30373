"""Islands: parts of a graph that stay FP32 while the rest becomes FP16, with their own constants and casts around them.

`fp16_rules` chooses the nodes. `to_fp32_islands` gives them their own FP32 constants, puts casts on the edges between inside
and outside, and returns what is FP32; `precision.to_fp16` then converts everything else. Some nodes outside have single
inputs or outputs that are FP32 by definition, such as the scales of Resize: these are borders of islands too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from maskplan.exporters.subgraphs import subgraphs, walk_graphs

# They read no floating-point activation: a second copy in FP32 costs nothing and saves a cast.
_DUPLICABLE = ("Constant", "DequantizeLinear")


@dataclass(frozen=True)
class NodePrecision:
    """What of a node is FP32.

    Attributes:
        is_fp32: All of it, its subgraphs included.
        inputs: Else, positions of inputs that are FP32 by definition.
        outputs: The same of outputs.
    """

    is_fp32: bool = False
    inputs: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()

    def reads(self, node: onnx.NodeProto) -> tuple[set[str], set[str]]:
        """The names that a node reads in FP32 and in FP16; both include names of other types."""
        if self.is_fp32:
            return set(reads(node)), set()
        fp32 = {node.input[i] for i in self.inputs}
        fp16 = {name for i, name in enumerate(node.input) if name and i not in self.inputs}
        return fp32, fp16 | set(nested_reads(node))

    def rename(self, node: onnx.NodeProto, fp32: Mapping[str, str], fp16: Mapping[str, str]) -> None:
        """Rename, in place, what a node reads in FP32 and what it reads in FP16."""
        inputs = [
            (fp32 if self.is_fp32 or i in self.inputs else fp16).get(name, name) for i, name in enumerate(node.input)
        ]
        rename_reads(node, fp32 if self.is_fp32 else fp16)
        node.input[:] = inputs

    def fp32_outputs(self, node: onnx.NodeProto) -> set[str]:
        """Names of the values that a node returns in FP32, if they are floats."""
        return {name for i, name in enumerate(node.output) if name and (self.is_fp32 or i in self.outputs)}


@dataclass(frozen=True)
class Islands:
    """A graph with its islands.

    Attributes:
        precisions: Of each node of the main graph, in its order.
        values: Names of all values and initializers that stay FP32.
    """

    precisions: list[NodePrecision]
    values: set[str]


def to_fp32_islands(graph: onnx.GraphProto, precisions: Sequence[NodePrecision], floats: frozenset[str]) -> Islands:
    """Isolate, in place, the parts of a graph that stay FP32, so that the rest can become FP16.

    Casts convert the values that cross the border of an island. Where Q/DQ nodes are the border, integers cross it and no
    cast is needed. Constants that both sides read are duplicated, the FP32 copy as `NAME_fp32`. A loop or branch is one
    node: it is isolated as a whole.

    Args:
        graph: In FP32.
        precisions: Of each node.
        floats: Names of all values in FP32.
    """
    # Names in use; new ones must differ from all of them, and each step below adds its own.
    names = used_names(graph)
    kinds = _duplicate_constant_nodes(graph, list(precisions), floats, names)
    fp32 = {name for node, kind in zip(graph.node, kinds, strict=True) for name in kind.fp32_outputs(node)}
    fp32 |= _duplicate_initializers(graph, kinds, names)
    # Last: by now every constant that an island reads is its own, so only activations are left to cross the border.
    kinds, casts = _insert_casts(graph, kinds, floats, names)
    return Islands(kinds, fp32 | casts)


def _duplicate_constant_nodes(
    graph: onnx.GraphProto, kinds: list[NodePrecision], floats: frozenset[str], names: set[str]
) -> list[NodePrecision]:
    """Give islands their own Constant and DequantizeLinear nodes in FP32; nodes that only islands read join them.

    Returns:
        The precisions of the nodes, of which there may be more now.
    """
    outputs = {value.name for value in graph.output}
    in_fp32, in_fp16 = _readers(graph, kinds)
    nodes: list[onnx.NodeProto] = []
    result: list[NodePrecision] = []
    renamed: dict[str, str] = {}
    for node, kind in zip(graph.node, kinds, strict=True):
        kind.rename(node, renamed, {})
        if not kind.is_fp32 and node.op_type in _DUPLICABLE and node.output[0] in in_fp32 & floats:
            if node.output[0] in in_fp16 or node.output[0] in outputs:
                # The original stays outside, before its copy: nodes keep their topological order.
                nodes.append(node)
                result.append(kind)
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                renamed[node.output[0]] = copy.output[0] = unused_name(f"{node.output[0]}_fp32", names)
                copy.name = f"{node.name}_fp32" if node.name else ""
                node = copy
            kind = NodePrecision(is_fp32=True)
        nodes.append(node)
        result.append(kind)
    _replace_nodes(graph, nodes)
    return result


def _duplicate_initializers(graph: onnx.GraphProto, kinds: list[NodePrecision], names: set[str]) -> set[str]:
    """Give islands FP32 copies of the initializers that nodes outside read too; the names that stay FP32."""
    in_fp32, in_fp16 = _readers(graph, kinds)
    outputs = {value.name for value in graph.output}
    stored = {tensor.name for tensor in graph.initializer}
    to_fp32: dict[str, str] = {}
    to_fp16: dict[str, str] = {}
    for tensor in [t for t in graph.initializer if t.data_type == TensorProto.FLOAT and t.name in in_fp16]:
        # A stored tensor that is an output of the graph keeps its name and type: the copy is for those that read FP16.
        is_output = tensor.name in outputs
        if is_output or tensor.name in in_fp32:
            copy = graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = unused_name(f"{tensor.name}_{'fp16' if is_output else 'fp32'}", names)
            (to_fp16 if is_output else to_fp32)[tensor.name] = copy.name
    for node, kind in zip(graph.node, kinds, strict=True):
        kind.rename(node, to_fp32, to_fp16)
    return ((in_fp32 & stored) - in_fp16) | (outputs & stored) | set(to_fp32.values())


def _insert_casts(
    graph: onnx.GraphProto, kinds: list[NodePrecision], floats: frozenset[str], names: set[str]
) -> tuple[list[NodePrecision], set[str]]:
    """Insert a cast behind each value that crosses a border; the precisions of all nodes and the names of FP32 casts."""
    in_fp32, in_fp16 = _readers(graph, kinds)
    nodes: list[onnx.NodeProto] = []
    result: list[NodePrecision] = []
    # From a value's name to that of its cast copy. The graph is sorted, so a cast exists before its readers are renamed.
    to_fp32: dict[str, str] = {}
    to_fp16: dict[str, str] = {}
    for node, kind in zip(graph.node, kinds, strict=True):
        kind.rename(node, to_fp32, to_fp16)
        nodes.append(node)
        result.append(kind)
        returned = kind.fp32_outputs(node)
        for name in node.output:
            is_fp32 = name in returned
            if name in (in_fp16 if is_fp32 else in_fp32) and name in floats:
                suffix = "fp16" if is_fp32 else "fp32"
                copy = unused_name(f"{name}_{suffix}", names)
                (to_fp16 if is_fp32 else to_fp32)[name] = copy
                target = TensorProto.FLOAT16 if is_fp32 else TensorProto.FLOAT
                nodes.append(helper.make_node("Cast", [name], [copy], f"{name}_to_{suffix}", to=target))
                result.append(NodePrecision(inputs=frozenset((0,))) if is_fp32 else NodePrecision(is_fp32=True))
    _replace_nodes(graph, nodes)
    return result, set(to_fp32.values())


def _readers(graph: onnx.GraphProto, kinds: Sequence[NodePrecision]) -> tuple[set[str], set[str]]:
    """Names that are read in FP32, and names that are read in FP16."""
    in_fp32: set[str] = set()
    in_fp16: set[str] = set()
    for node, kind in zip(graph.node, kinds, strict=True):
        fp32, fp16 = kind.reads(node)
        in_fp32 |= fp32
        in_fp16 |= fp16
    return in_fp32, in_fp16


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, including those that its loops and branches read."""
    yield from (name for name in node.input if name)
    yield from nested_reads(node)


def nested_reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node's loops and branches read."""
    for inner in subgraphs(node):
        for inner_node in inner.node:
            yield from reads(inner_node)


def rename_reads(node: onnx.NodeProto, renamed: Mapping[str, str]) -> None:
    """Rename what a node reads, in place, in its loops and branches too."""
    node.input[:] = [renamed.get(name, name) for name in node.input]
    for inner in subgraphs(node):
        for inner_node in inner.node:
            rename_reads(inner_node, renamed)


def _replace_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    copies = []
    # Copied first: deleting the old nodes would invalidate those in `nodes`.
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del graph.node[:]
    graph.node.extend(copies)


def unused_name(wanted: str, names: set[str]) -> str:
    """A name that is not in use yet; added to `names`."""
    name, count = wanted, 1
    while name in names:
        count += 1
        name = f"{wanted}_{count}"
    names.add(name)
    return name


def used_names(graph: onnx.GraphProto) -> set[str]:
    """All names of values in a graph and its subgraphs."""
    names: set[str] = set()
    for inner in walk_graphs(graph):
        names |= {value.name for value in (*inner.input, *inner.output, *inner.initializer)}
        for node in inner.node:
            names |= {*node.input, *node.output}
    return names
