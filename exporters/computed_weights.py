"""Weights that are not stored as their operator reads them: their values, and how they are stored for pruning and INT8.

A weight may be computed from stored tensors (normalized, joined from parts, split off), or stored in another layout or type
behind Identity, Cast, Reshape and Transpose. The check reads the values that the operator gets. What changes weights works
on a graph in which the operator reads a stored tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import inliner, numpy_helper

from maskplan.exporters.folding import Expression, FoldError, constant_expression, fold
from maskplan.exporters.scopes import MAX_DEPTH, Scope
from maskplan.exporters.subgraphs import subgraphs, walk_nodes
from maskplan.exporters.tensors import TensorError, native_values
from maskplan.exporters.weights import WeightUse, weight_uses
from maskplan.pipeline.core.weight_ops import WEIGHT_OPS
from maskplan.pipeline.masking.eligibility import ineligible_reason

# Nodes of a graph whose local functions are inlined: a few functions that call each other could ask for billions.
_MAX_INLINED = 200_000


def folded(use: WeightUse, folder: Path | None, m: int) -> WeightUse | None:
    """The use with its computed values as its tensor; None if it turns out to have fewer than two axes.

    Args:
        use: With an expression.
        folder: Of the ONNX file, for external data.
        m: Group length.

    Raises:
        FoldError: The values cannot be computed here.
        TensorError: A stored tensor cannot be read.
    """
    assert use.expression is not None
    values = fold(use.expression, folder)
    if values.ndim < 2:
        return None
    tensor, axis = numpy_helper.from_array(values, use.name), use.axis % values.ndim
    reason = ineligible_reason(use.op, values.shape[axis], use.groups, m)
    # The value is as the operator reads it: (K, C, ...) of a convolution, else the outputs are the other of two axes.
    outputs = values.shape[0] if use.op == "Conv" else values.shape[-1 if axis == values.ndim - 2 else -2]
    return replace(use, tensor=tensor, axis=axis, reason=reason, outputs=outputs)


def is_masked(expression: Expression, folder: Path | None) -> bool:
    """Whether a computed weight is the product of another one and stored zeros and ones, or a choice between it and others.

    Raises:
        FoldError: The operands cannot be computed here.
        TensorError: A stored tensor cannot be read.
    """
    producer, scope = expression.scope.find(expression.name)
    if not isinstance(producer, onnx.NodeProto) or producer.op_type not in ("Mul", "Where"):
        return False
    for name in producer.input if producer.op_type == "Mul" else ():
        tensor, found = scope.constant(name), constant_expression(name, scope)
        if tensor is None and found is None:
            return False
        values = native_values(tensor, folder) if found is None else fold(found, folder)
        if not values.all() and bool(((values == 0) | (values == 1)).all()):
            return True
    return bool(producer.op_type == "Where")


def store_computed_weights(model: onnx.ModelProto, folder: Path | None, m: int = 4) -> None:
    """Let every operator of the main graph whose weight is computed read a stored tensor instead, in place.

    Local functions are inlined first where one holds such a weight. Weights that cannot be computed here stay as they are.
    """
    computed = [use for use in weight_uses(model, m) if use.expression is not None]
    if not computed:
        return
    if any(use.expression is not None and use.expression.scope.outer is None for use in computed) and model.functions:
        inline_functions(model)
        computed = [use for use in weight_uses(model, m) if use.expression is not None]
    names = {use.expression.name for use in computed if use.expression is not None}
    _store(model.graph, names.__contains__, folder)


def store_weights(model: onnx.ModelProto, folder: Path | None) -> None:
    """Let every Conv, Gemm and MatMul of the main graph read its weight from a stored tensor, as it is, in place.

    Weights behind Identity, Cast, Reshape, Transpose and the like, computed ones, and those in local functions, which are
    inlined. A weight keeps the name of the tensor that it is stored in if nothing else reads that.
    """
    if model.functions:
        inline_functions(model)
    names = {use.name for use in weight_uses(model) if use.tensor is not None}
    _store(model.graph, lambda _: True, folder, names)


def inline_functions(model: onnx.ModelProto) -> None:
    """Replace calls of local functions by the functions' nodes, in place; very large results and recursion are left."""
    if _inlined_size(model) > _MAX_INLINED:
        return
    model.CopyFrom(inliner.inline_local_functions(model))


def _inlined_size(model: onnx.ModelProto) -> int:
    functions = {(f.domain, f.name): f for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}
    # Each round adds one level of calls; recursion never comes to rest.
    for _ in range(len(functions) + 1):
        before = dict(sizes)
        for key, function in functions.items():
            nodes = walk_nodes(function.node)
            sizes[key] = min(sum(before.get((n.domain, n.op_type), 1) for n in nodes), _MAX_INLINED + 1)
        if sizes == before:
            return sum(sizes.get((n.domain, n.op_type), 1) for n in walk_nodes(model.graph.node))
    return _MAX_INLINED + 1


def _store(
    graph: onnx.GraphProto, wanted: Callable[[str], bool], folder: Path | None, names: set[str] | None = None
) -> None:
    scope = Scope.of(graph, None)
    found: dict[str, onnx.TensorProto] = {}
    sources: dict[str, Expression] = {}
    copies = set[str]()
    for node in graph.node:
        if node.op_type not in WEIGHT_OPS or node.domain not in ("", "ai.onnx"):
            continue
        for operand in WEIGHT_OPS[node.op_type].operands:
            name = node.input[operand.index] if operand.index < len(node.input) else ""
            if not name or name in found or scope.constant(name) is not None or not wanted(name):
                continue
            original = _copied(name, scope)
            if original is not None:
                copies.add(name)
                node.input[operand.index] = original
                continue
            expression = constant_expression(name, scope)
            if expression is None:
                continue
            try:
                values = fold(expression, folder)
            except (FoldError, TensorError):
                continue
            if values.ndim > 1:
                found[name], sources[name] = numpy_helper.from_array(values, name), expression
    _replace(graph, found, copies)
    if names is not None:
        _restore_names(graph, sources, names)


def _copied(name: str, scope: Scope) -> str | None:
    """The name of the stored tensor that a value is an unchanged copy of, by Identity; None if there is none."""
    for _ in range(MAX_DEPTH):
        producer = scope.producers.get(name)
        if producer is None or producer.op_type != "Identity" or not producer.input:
            break
        name = producer.input[0]
        if name in scope.constants:
            return name
    return None


def _replace(graph: onnx.GraphProto, found: dict[str, onnx.TensorProto], copies: set[str]) -> None:
    """Store the values under the names of the outputs that they were computed as, and remove what only computed them."""
    taken, returned = _names_in(graph), {value.name for value in graph.output}
    # An output of the graph keeps its producer, so that the weight needs another name.
    weights = {name: _unused(f"{name}_stored", taken) for name in found if name in returned}
    unread = {name: _unused(f"{name}_computed", taken) for name in found if name not in returned}
    for name, tensor in found.items():
        tensor.name = weights.get(name, name)
        graph.initializer.append(tensor)
    for node in graph.node:
        node.output[:] = [unread.get(name, name) for name in node.output]
        node.input[:] = [weights.get(name, name) for name in node.input]
    kept = [value for value in graph.value_info if value.name not in unread]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    _remove_unread(graph, copies | set(unread.values()))


def _remove_unread(graph: onnx.GraphProto, dead: set[str]) -> None:
    """Remove the nodes of which nothing is read, from these outputs backward, and stored tensors that only they read."""
    readers = Counter(name for node in walk_nodes(graph.node) for name in node.input)
    readers.update(value.name for inner in _inner_graphs(graph) for value in inner.output)
    readers.update(value.name for value in graph.output)
    kept = []
    for node in reversed(graph.node):
        if dead.intersection(node.output) and not any(readers[name] for name in node.output):
            readers.subtract(node.input)
            dead.update(name for name in node.input if not readers[name])
        else:
            kept.append(node)
    kept.reverse()
    del graph.node[:]
    graph.node.extend(kept)
    stored = dead.intersection(tensor.name for tensor in graph.initializer)
    for part in (graph.initializer, graph.input):
        for value in [value for value in part if value.name in stored]:
            part.remove(value)


def _names_in(graph: onnx.GraphProto) -> set[str]:
    names = {value.name for part in (graph.input, graph.output, graph.initializer) for value in part}
    for node in walk_nodes(graph.node):
        names.update((*node.input, *node.output))
    return names


def _unused(wanted: str, taken: set[str]) -> str:
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    taken.add(name)
    return name


def _inner_graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    return [inner for node in walk_nodes(graph.node) for inner in subgraphs(node)]


def _restore_names(graph: onnx.GraphProto, sources: dict[str, Expression], names: set[str]) -> None:
    """Give a weight the name of the one stored tensor that it was, if that is no longer in the graph."""
    taken, renamed = _names_in(graph), dict[str, str]()
    for name, expression in sources.items():
        if len(expression.stored) != 1 or expression.stored[0] in taken or expression.stored[0] not in names:
            continue
        renamed[name] = expression.stored[0]
        taken.add(renamed[name])
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in walk_nodes(graph.node):
        node.input[:] = [renamed.get(operand, operand) for operand in node.input]
