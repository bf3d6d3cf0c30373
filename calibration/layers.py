"""Every layer of a model with the type that it gets, and why: what `place` quantizes, and what it does not look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from maskplan.calibration.graph import STANDARD, Graph
from maskplan.calibration.placement import Placement
from maskplan.exporters.subgraphs import subgraphs, walk_nodes
from maskplan.exporters.unseen import unseen_uses
from maskplan.pipeline.core.choices import INT8
from maskplan.pipeline.core.weight_ops import WEIGHT_OPS


@dataclass(frozen=True)
class CalibratedLayer:
    """A layer.

    Attributes:
        node: Name of the node.
        op: Its type.
        weight: Name of its weight; empty if it has none that is stored.
        dtype: `int8`, or the float type of everything else.
        reason: Why it is not INT8; None if it is.
    """

    node: str
    op: str
    weight: str
    dtype: str
    reason: str | None


def list_layers(model: onnx.ModelProto, placement: Placement, float_dtype: str) -> tuple[CalibratedLayer, ...]:
    """All layers in the order of the graph, those of subgraphs and local functions behind their caller.

    Args:
        model: The float model of the placement.
        placement: From `place`.
        float_dtype: Type of the layers that are not quantized.
    """
    graph = Graph(model.graph)
    quantized = {weight.node: weight.tensor for weight in placement.weights}
    reasons = dict(placement.in_float)
    unseen = {use.node: use for use in unseen_uses(model)}
    functions = {(f.domain, f.name): f for f in model.functions}
    layers = []
    for n, node in enumerate(graph.nodes):
        name = graph.names[n]
        if name in quantized:
            layers.append(CalibratedLayer(name, node.op_type, quantized[name], INT8, None))
        elif name in reasons:
            layers.append(CalibratedLayer(name, node.op_type, node.input[1], float_dtype, reasons[name]))
        elif (use := unseen.get(node.name or name)) is not None and use.op == node.op_type:
            why = f"{node.op_type} is not quantized" + (f": {use.hint}" if use.hint else "")
            layers.append(CalibratedLayer(name, node.op_type, use.name, float_dtype, why))
        elif node.op_type in WEIGHT_OPS and node.domain in STANDARD:
            layers.append(CalibratedLayer(name, node.op_type, "", float_dtype, _why(graph, node)))
        inner = [inside for part in subgraphs(node) for inside in walk_nodes(part.node)]
        if (function := functions.get((node.domain, node.op_type))) is not None:
            inner += walk_nodes(function.node)
        layers += _inside(inner, "a local function" if function is not None else "a subgraph", name, float_dtype)
    return tuple(layers)


def _why(graph: Graph, node: onnx.NodeProto) -> str:
    """Why `place` does not look at a node of this kind."""
    if not WEIGHT_OPS[node.op_type].is_quantizable:
        return f"{node.op_type} is not quantized"
    if any(name in graph.constants for name in node.input[:2]):
        return f"{node.op_type} whose weight is its first operand"
    return f"{node.op_type} of two activations"


def _inside(nodes: list[onnx.NodeProto], what: str, caller: str, float_dtype: str) -> Iterator[CalibratedLayer]:
    for node in nodes:
        if node.op_type in WEIGHT_OPS and node.domain in STANDARD:
            name = node.name or (node.output[0] if node.output else node.op_type)
            yield CalibratedLayer(name, node.op_type, "", float_dtype, f"inside {what} of {caller}")
