"""The parts of a graph that stay FP32 when the rest becomes FP16: their nodes, constants and the casts around them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx
from onnx import TensorProto, helper

from maskplan.exporters.half_range import NEVER_LARGER
from maskplan.exporters.subgraphs import subgraphs
from maskplan.pipeline.core.errors import InputError, listed

# They read no activation in floating point: a second one in FP32 costs nothing and spares a cast.
_REPEATABLE = ("Constant", "DequantizeLinear")
# They fuse with the layer before them, which a cast between the two would prevent.
_FOLLOWING = ("Clip", "LeakyRelu", "QuantizeLinear", "Relu")


def to_fp32_islands(model: onnx.ModelProto, tensors: Collection[str]) -> set[str]:
    """Set the nodes that make or read some tensors apart, in place, so that the rest of the graph can become FP16.

    Values pass between the parts through casts. Q/DQ at the border take the part's own type instead, so that integers pass,
    and constants that both parts use exist twice, the FP32 copy as `NAME_fp32`. Where a tensor was only pooled, reshaped or
    rectified from another, that one is set apart too: it is at least as large.

    Args:
        model: In FP32.
        tensors: Names of values of the main graph. Loops and branches are set apart as a whole.

    Returns:
        Names of all values and initializers that stay FP32: of a node that is set apart, all outputs.

    Raises:
        InputError: The graph has no such tensors; all are named.
    """
    graph = model.graph
    _require_known(graph, tensors)
    if not tensors:
        return set()
    floats = _float_values(model)
    inside = _inside(graph, _sources(graph, tensors))
    names = {name for node in graph.node for name in (*node.output, *reads(node))}
    names |= {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    inside = _repeat(graph, inside, floats, names)
    kept = {name for node, kept_apart in zip(graph.node, inside, strict=True) if kept_apart for name in node.output}
    kept |= _own_constants(graph, inside, names)
    return kept | _casts(graph, inside, floats, names)


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


def _sources(graph: onnx.GraphProto, tensors: Collection[str]) -> set[str]:
    """The tensors, and those that are at least as large because they were made from them."""
    wanted = set(tensors)
    for node in reversed(graph.node):
        if node.op_type in NEVER_LARGER and node.output[0] in wanted:
            wanted.add(node.input[0])
    return wanted


def _inside(graph: onnx.GraphProto, wanted: set[str]) -> list[bool]:
    """Which nodes make or read one of the tensors, or rectify or quantize what these make."""
    inside = []
    made: set[str] = set()
    for node in graph.node:
        apart = not wanted.isdisjoint((*node.output, *reads(node)))
        apart |= node.op_type in _FOLLOWING and node.input[0] in made
        inside.append(apart)
        if apart:
            made.update(node.output)
    return inside


def _repeat(graph: onnx.GraphProto, inside: list[bool], floats: set[str], names: set[str]) -> list[bool]:
    """Give the nodes inside constants and dequantized values in FP32; those that nobody outside reads just move."""
    outputs = {value.name for value in graph.output}
    by_inside, by_others = _read_by(graph, inside)
    nodes: list[onnx.NodeProto] = []
    apart_now: list[bool] = []
    renamed: dict[str, str] = {}
    for node, apart in zip(graph.node, inside, strict=True):
        if apart:
            rename_reads(node, renamed)
        elif node.op_type in _REPEATABLE and node.output[0] in by_inside & floats:
            if node.output[0] in by_others or node.output[0] in outputs:
                nodes.append(node)
                apart_now.append(False)
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                renamed[node.output[0]] = copy.output[0] = _free(f"{node.output[0]}_fp32", names)
                copy.name = f"{node.name}_fp32" if node.name else ""
                node = copy
            apart = True
        nodes.append(node)
        apart_now.append(apart)
    _replace(graph, nodes)
    return apart_now


def _own_constants(graph: onnx.GraphProto, inside: list[bool], names: set[str]) -> set[str]:
    """The initializers of the nodes inside, copied where others read them too."""
    by_inside, by_others = _read_by(graph, inside)
    renamed = {}
    for tensor in [t for t in graph.initializer if t.name in by_inside & by_others]:
        if tensor.data_type == TensorProto.FLOAT:
            copy = graph.initializer.add()
            copy.CopyFrom(tensor)
            renamed[tensor.name] = copy.name = _free(f"{tensor.name}_fp32", names)
    for node, apart in zip(graph.node, inside, strict=True):
        if apart:
            rename_reads(node, renamed)
    stored = {tensor.name for tensor in graph.initializer}
    return (by_inside & stored) - by_others | set(renamed.values())


def _casts(graph: onnx.GraphProto, inside: list[bool], floats: set[str], names: set[str]) -> set[str]:
    """Cast what passes between the parts; the FP32 values made so."""
    by_inside, by_others = _read_by(graph, inside)
    nodes: list[onnx.NodeProto] = []
    to_single: dict[str, str] = {}
    to_half: dict[str, str] = {}
    for node, apart in zip(graph.node, inside, strict=True):
        rename_reads(node, to_single if apart else to_half)
        nodes.append(node)
        crossing, renamed, kind, suffix = (
            (by_others, to_half, TensorProto.FLOAT16, "fp16")
            if apart
            else (by_inside, to_single, TensorProto.FLOAT, "fp32")
        )
        for name in node.output:
            if name in crossing and name in floats:
                renamed[name] = _free(f"{name}_{suffix}", names)
                nodes.append(helper.make_node("Cast", [name], [renamed[name]], f"{name}_to_{suffix}", to=kind))
    _replace(graph, nodes)
    return set(to_single.values())


def _read_by(graph: onnx.GraphProto, inside: list[bool]) -> tuple[set[str], set[str]]:
    by_inside: set[str] = set()
    by_others: set[str] = set()
    for node, apart in zip(graph.node, inside, strict=True):
        (by_inside if apart else by_others).update(reads(node))
    return by_inside, by_others


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, its loops and branches included."""
    yield from (name for name in node.input if name)
    for inner in subgraphs(node):
        for inner_node in inner.node:
            yield from reads(inner_node)


def rename_reads(node: onnx.NodeProto, renamed: dict[str, str]) -> None:
    """Let a node read other values, in place, in its loops and branches too."""
    node.input[:] = [renamed.get(name, name) for name in node.input]
    for inner in subgraphs(node):
        for inner_node in inner.node:
            rename_reads(inner_node, renamed)


def _replace(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    copies = []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del graph.node[:]
    graph.node.extend(copies)


def _free(wanted: str, names: set[str]) -> str:
    name, count = wanted, 1
    while name in names:
        count += 1
        name = f"{wanted}_{count}"
    names.add(name)
    return name
