"""The stored constant that is added to a layer's outputs: its bias, or that of an Add that reads a product alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from maskplan.exporters.layer_inputs import ObservedLayer
from maskplan.exporters.subgraphs import walk_graphs, walk_nodes
from maskplan.exporters.tensors import Array, native_values


@dataclass(frozen=True)
class BiasSlot:
    """Where a layer's outputs can be shifted.

    Attributes:
        graph: Whose node it is.
        node: A Conv, a Gemm, or the Add after a MatMul.
        index: Of the node's input.
        stored: The constant, in its own type; None if there is none yet.
        scale: What a shift of the products is multiplied by to give a shift of the constant.
        column: The outputs are rows: a shift (K,) is added as (K, 1).
        before_norm: A BatchNormalization reads the outputs, and nothing else does.
    """

    graph: onnx.GraphProto
    node: onnx.NodeProto
    index: int
    stored: Array | None
    scale: float
    column: bool
    before_norm: bool


def bias_slot(model: onnx.ModelProto, layer: ObservedLayer, folder: Path) -> BiasSlot | None:
    """Where the outputs of a layer can be shifted; None if nowhere, or if several nodes use its weight.

    Raises:
        TensorError: A stored bias cannot be read.
    """
    if len(layer.calls) > 1:
        return None
    call = layer.calls[0]
    node, scope, operand = call.node, call.scope, call.use.operand
    graph = next((g for g in walk_graphs(model.graph) if any(n is node for n in g.node)), None)
    if graph is None:
        return None
    readers = [n for n in walk_nodes(graph.node) if node.output[0] in n.input]
    is_alone = len(readers) == 1 and node.output[0] not in {v.name for v in graph.output}
    before_norm = is_alone and readers[0].op_type == "BatchNormalization"
    index, scale = 2, 1.0
    if node.op_type == "Gemm":
        alpha, beta = (float(call.attributes.get(name, 1.0)) for name in ("alpha", "beta"))
        if beta == 0:
            return None
        scale = alpha / beta
    elif node.op_type == "MatMul":
        if not is_alone or readers[0].op_type != "Add" or readers[0] not in list(graph.node):
            return None
        node = readers[0]
        index = 1 if node.input[0] == call.node.output[0] else 0
    stored = None
    if len(node.input) > index and node.input[index]:
        tensor = scope.constant(node.input[index])
        if tensor is None or (node.op_type == "Add" and not _is_vector(tensor, layer.shape[0], operand)):
            return None
        stored = native_values(tensor, folder)
    return BiasSlot(graph, node, index, stored, scale, node.op_type != "Conv" and operand == 0, before_norm)


def _is_vector(tensor: onnx.TensorProto, outputs: int, operand: int) -> bool:
    """Whether adding a tensor to a product adds one number to each output channel."""
    shape = tuple(tensor.dims)
    if operand == 0:
        return len(shape) > 1 and shape[-2] == outputs
    return bool(shape) and shape[-1] == outputs


def shift_bias(model: onnx.ModelProto, slot: BiasSlot, name: str, shift: npt.NDArray[np.floating], dtype: str) -> None:
    """Add `shift` (K,) to a layer's products of inputs and weight, before Gemm multiplies them by alpha, in place.

    Args:
        model: The model that holds the slot.
        slot: Where.
        name: Of the layer's weight, for the name of a new constant.
        shift: (K,).
        dtype: Of the layer's outputs.
    """
    given = slot.scale * (shift[:, None] if slot.column else shift)
    old = slot.stored
    # In the precision of the sum, not in that of the file.
    new = (given if old is None else old.astype(np.float64) + given).astype(dtype if old is None else old.dtype)
    stored = next((t for t in slot.graph.initializer if _is_read(slot, t.name)), None)
    if stored is not None and _reads(model, stored.name) == 1:
        stored.CopyFrom(numpy_helper.from_array(new, stored.name))
        return
    taken = _names(model)
    free = (f"{name}_bias" if number == 0 else f"{name}_bias_{number}" for number in range(len(taken) + 1))
    fresh = next(candidate for candidate in free if candidate not in taken)
    slot.graph.initializer.append(numpy_helper.from_array(new, fresh))
    while len(slot.node.input) <= slot.index:
        slot.node.input.append("")
    slot.node.input[slot.index] = fresh


def _is_read(slot: BiasSlot, name: str) -> bool:
    return len(slot.node.input) > slot.index and slot.node.input[slot.index] == name


def _reads(model: onnx.ModelProto, name: str) -> int:
    """How often a name is read, or given or returned by a graph."""
    graphs: Sequence[onnx.GraphProto] = list(walk_graphs(model.graph))
    listed = [value.name for graph in graphs for part in (graph.input, graph.output) for value in part]
    read = [given for node in walk_nodes(model.graph.node) for given in node.input]
    return listed.count(name) + read.count(name)


def _names(model: onnx.ModelProto) -> set[str]:
    names = set[str]()
    for graph in walk_graphs(model.graph):
        names.update(value.name for part in (graph.input, graph.output, graph.initializer) for value in part)
        names.update(name for node in graph.node for name in (*node.input, *node.output))
    return names
