"""FP32 islands: parts of a graph that stay FP32 when the rest becomes FP16, with their own constants and casts around them.

An island is a set of nodes, a flag per node of the main graph (`inside`). `to_fp32_islands` chooses the nodes, gives them
their own FP32 constants, puts casts on the edges between inside and outside, and returns the names of all FP32 values;
`precision.to_fp16` then converts everything else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx
from onnx import TensorProto, helper

from maskplan.exporters.half_range import NON_INCREASING_OPS
from maskplan.exporters.subgraphs import subgraphs
from maskplan.pipeline.core.errors import InputError, listed

# They read no floating-point activation: a second copy in FP32 costs nothing and saves a cast.
_DUPLICABLE = ("Constant", "DequantizeLinear")
# Engines fuse them into the layer before, which a cast in between would prevent: they join that layer's island.
_FUSED_AFTER = ("Clip", "LeakyRelu", "QuantizeLinear", "Relu")


def to_fp32_islands(model: onnx.ModelProto, tensors: Collection[str]) -> set[str]:
    """Isolate, in place, the nodes that produce or read some tensors, so that the rest of the graph can become FP16.

    Casts convert the values that cross the border of an island. Where Q/DQ nodes are the border, integers cross it and no
    cast is needed. Constants that both sides read are duplicated, the FP32 copy as `NAME_fp32`. If a tensor is merely
    pooled, reshaped or rectified from another one, that one stays FP32 too: it is at least as large.

    Args:
        model: In FP32.
        tensors: Names of values of the main graph. A loop or branch is one node: it is isolated as a whole.

    Returns:
        Names of all values and initializers that stay FP32: for a node inside an island, all of its outputs.

    Raises:
        InputError: The graph has no such tensors; the message names them.
    """
    graph = model.graph
    _require_known(graph, tensors)
    if not tensors:
        return set()
    floats = _float_values(model)
    inside = _nodes_inside(graph, _with_sources(graph, tensors))
    # Names in use; new ones must differ from all of them, and each step below adds its own.
    names = {name for node in graph.node for name in (*node.output, *reads(node))}
    names |= {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    inside = _duplicate_constant_nodes(graph, inside, floats, names)
    fp32 = {name for node, is_inside in zip(graph.node, inside, strict=True) if is_inside for name in node.output}
    fp32 |= _duplicate_initializers(graph, inside, names)
    # Last: by now every constant that an island reads is its own, so only activations are left to cross the border.
    return fp32 | _insert_casts(graph, inside, floats, names)


def _require_known(graph: onnx.GraphProto, tensors: Collection[str]) -> None:
    known = {name for node in graph.node for name in node.output}
    known |= {value.name for value in (*graph.input, *graph.initializer)}
    missing = [name for name in tensors if name not in known]
    if missing:
        raise InputError(
            "the graph has no such tensors to keep in FP32",
            found=listed(missing),
            fix="name outputs of nodes of the main graph; ranges must come from this model",
        )


def _float_values(model: onnx.ModelProto) -> set[str]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    return {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}


def _with_sources(graph: onnx.GraphProto, tensors: Collection[str]) -> set[str]:
    """The tensors, and those from which they are pooled, reshaped or rectified, which are at least as large."""
    wanted = set(tensors)
    for node in reversed(graph.node):
        if node.op_type in NON_INCREASING_OPS and node.output[0] in wanted:
            wanted.add(node.input[0])
    return wanted


def _nodes_inside(graph: onnx.GraphProto, wanted: set[str]) -> list[bool]:
    """Whether each node produces or reads one of the tensors, or rectifies or quantizes the output of such a node."""
    inside = []
    produced: set[str] = set()
    for node in graph.node:
        is_inside = not wanted.isdisjoint((*node.output, *reads(node)))
        is_inside |= node.op_type in _FUSED_AFTER and node.input[0] in produced
        inside.append(is_inside)
        if is_inside:
            produced.update(node.output)
    return inside


def _duplicate_constant_nodes(
    graph: onnx.GraphProto, inside: list[bool], floats: set[str], names: set[str]
) -> list[bool]:
    """Give islands their own Constant and DequantizeLinear nodes in FP32; nodes that only islands read join them.

    Returns:
        The flags of the nodes, of which there may be more now.
    """
    outputs = {value.name for value in graph.output}
    by_inside, by_outside = _readers(graph, inside)
    nodes: list[onnx.NodeProto] = []
    flags: list[bool] = []
    renamed: dict[str, str] = {}
    for node, is_inside in zip(graph.node, inside, strict=True):
        if is_inside:
            rename_reads(node, renamed)
        elif node.op_type in _DUPLICABLE and node.output[0] in by_inside & floats:
            if node.output[0] in by_outside or node.output[0] in outputs:
                # The original stays outside, before its copy: nodes keep their topological order.
                nodes.append(node)
                flags.append(False)
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                renamed[node.output[0]] = copy.output[0] = _unused_name(f"{node.output[0]}_fp32", names)
                copy.name = f"{node.name}_fp32" if node.name else ""
                node = copy
            is_inside = True
        nodes.append(node)
        flags.append(is_inside)
    _replace_nodes(graph, nodes)
    return flags


def _duplicate_initializers(graph: onnx.GraphProto, inside: list[bool], names: set[str]) -> set[str]:
    """Give islands FP32 copies of the initializers that nodes outside read too; the names that stay FP32."""
    by_inside, by_outside = _readers(graph, inside)
    renamed = {}
    for tensor in [t for t in graph.initializer if t.name in by_inside & by_outside]:
        if tensor.data_type == TensorProto.FLOAT:
            copy = graph.initializer.add()
            copy.CopyFrom(tensor)
            renamed[tensor.name] = copy.name = _unused_name(f"{tensor.name}_fp32", names)
    for node, is_inside in zip(graph.node, inside, strict=True):
        if is_inside:
            rename_reads(node, renamed)
    stored = {tensor.name for tensor in graph.initializer}
    return (by_inside & stored) - by_outside | set(renamed.values())


def _insert_casts(graph: onnx.GraphProto, inside: list[bool], floats: set[str], names: set[str]) -> set[str]:
    """Insert a cast behind each value that crosses a border; the names of the new FP32 values."""
    by_inside, by_outside = _readers(graph, inside)
    nodes: list[onnx.NodeProto] = []
    # From a value's name to that of its cast copy. The graph is sorted, so a cast exists before its readers are renamed.
    to_fp32: dict[str, str] = {}
    to_fp16: dict[str, str] = {}
    for node, is_inside in zip(graph.node, inside, strict=True):
        rename_reads(node, to_fp32 if is_inside else to_fp16)
        nodes.append(node)
        crossing, renamed, kind, suffix = (
            (by_outside, to_fp16, TensorProto.FLOAT16, "fp16")
            if is_inside
            else (by_inside, to_fp32, TensorProto.FLOAT, "fp32")
        )
        for name in node.output:
            if name in crossing and name in floats:
                renamed[name] = _unused_name(f"{name}_{suffix}", names)
                nodes.append(helper.make_node("Cast", [name], [renamed[name]], f"{name}_to_{suffix}", to=kind))
    _replace_nodes(graph, nodes)
    return set(to_fp32.values())


def _readers(graph: onnx.GraphProto, inside: list[bool]) -> tuple[set[str], set[str]]:
    """Names that nodes inside islands read, and names that nodes outside read."""
    by_inside: set[str] = set()
    by_outside: set[str] = set()
    for node, is_inside in zip(graph.node, inside, strict=True):
        (by_inside if is_inside else by_outside).update(reads(node))
    return by_inside, by_outside


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, including those that its loops and branches read."""
    yield from (name for name in node.input if name)
    for inner in subgraphs(node):
        for inner_node in inner.node:
            yield from reads(inner_node)


def rename_reads(node: onnx.NodeProto, renamed: dict[str, str]) -> None:
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


def _unused_name(wanted: str, names: set[str]) -> str:
    name, count = wanted, 1
    while name in names:
        count += 1
        name = f"{wanted}_{count}"
    names.add(name)
    return name
