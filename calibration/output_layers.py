"""The last layers before outputs that hold values, such as boxes: their errors go into the result unchanged."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from maskplan.calibration.graph import Graph
from maskplan.calibration.placement import Placement
from maskplan.exporters.fixed_weights import is_fixed
from maskplan.exporters.weights import weight_uses
from maskplan.pipeline.core.artifacts import OutputKind
from maskplan.pipeline.core.choices import VALUES

HEAD = "the last layer before an output of values: --quantize-heads quantizes it too"
TABLE = "a table that decodes an output of values: --quantize-heads quantizes it too"


def output_layers(model: onnx.ModelProto, placement: Placement, kinds: Sequence[OutputKind]) -> dict[str, str]:
    """Quantized layers from which an output of values is reached without another layer, with why they are to stay float.

    In the order of the graph. Layers whose weight is a table, such as the bins of a box decoder, are passed through: they
    only decode, and stay float with the layer before them. Empty if these are all layers of the network, and if
    no output holds values.

    Args:
        model: FP32, without external data.
        placement: Of all layers that can be quantized.
        kinds: Of the outputs.
    """
    graph = Graph(model.graph)
    tables = {u.node for u in weight_uses(model) if u.tensor is not None and u.reason is None and is_fixed(u, None)}
    layers = {weight.node for weight in placement.weights} - tables
    wanted = [kind.name for kind in kinds if kind.kind == VALUES]
    seen, found, passed = set[str](), set[str](), set[str]()
    while wanted:
        tensor = wanted.pop()
        if tensor in seen or tensor not in graph.producers:
            continue
        seen.add(tensor)
        n = graph.producers[tensor]
        if graph.names[n] in layers:
            found.add(graph.names[n])
        else:
            passed.add(graph.names[n])
            wanted.extend(graph.nodes[n].input)
    if found == layers:
        return {}
    reasons = dict.fromkeys(found, HEAD) | dict.fromkeys(passed & tables, TABLE)
    return {name: reasons[name] for name in graph.names if name in reasons}
