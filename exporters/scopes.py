"""Names in ONNX graphs: which tensor or node a name refers to, through subgraphs and local functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import helper

from maskplan.exporters.subgraphs import subgraphs

STANDARD = ("", "ai.onnx")
"""The domain of ONNX's own operators."""

MAX_DEPTH = 32
"""Nodes in a chain, and nested graphs: a limit on hostile files."""


@dataclass(frozen=True)
class Scope:
    """The names that are visible to the nodes of one graph."""

    constants: Mapping[str, onnx.TensorProto]
    producers: Mapping[str, onnx.NodeProto]
    outer: Scope | None
    # The formal inputs of a function, with the name that the caller passes and the scope of that name.
    passed: Mapping[str, tuple[str, Scope]] = field(default_factory=dict)
    # Attributes of the call, to which nodes of the function refer by name.
    given: Mapping[str, onnx.AttributeProto] = field(default_factory=dict)

    @staticmethod
    def of(graph: onnx.GraphProto, outer: Scope | None) -> Scope:
        """The scope of a graph; `outer` is that of the node which holds it, None for the main graph."""
        producers = {name: node for node in graph.node for name in node.output}
        given = outer.given if outer is not None else {}
        return Scope({t.name: t for t in graph.initializer}, producers, outer, given=given)

    @staticmethod
    def inside(function: onnx.FunctionProto, call: onnx.NodeProto, caller: Scope) -> Scope:
        """The scope of a local function's nodes for one call of it."""
        defaults = {a.name: a for a in function.attribute_proto}
        return Scope(
            constants={},
            producers={name: node for node in function.node for name in node.output},
            outer=None,
            passed={formal: (actual, caller) for formal, actual in zip(function.input, call.input, strict=False)},
            given={**defaults, **{a.name: a for a in call.attribute}},
        )

    def find(self, name: str) -> tuple[onnx.TensorProto | onnx.NodeProto | None, Scope]:
        """The tensor or node that a name refers to, and the scope that contains it."""
        scope: Scope | None = self
        # Bounded: a function that passes its own input to itself would never end.
        for _ in range(MAX_DEPTH * MAX_DEPTH):
            if scope is None:
                break
            if name in scope.constants:
                return scope.constants[name], scope
            if name in scope.producers:
                return scope.producers[name], scope
            if name in scope.passed:
                name, scope = scope.passed[name]
            else:
                scope = scope.outer
        return None, self

    def attributes(self, node: onnx.NodeProto) -> dict[str, Any]:
        """A node's attributes by name, with those of the call in place of references to them."""
        values = {}
        for attribute in node.attribute:
            source = self.given.get(attribute.ref_attr_name) if attribute.ref_attr_name else attribute
            if source is not None:
                values[attribute.name] = helper.get_attribute_value(source)
        return values

    def constant(self, name: str) -> onnx.TensorProto | None:
        """The stored tensor of that name, an initializer's or a Constant node's; None if it is computed."""
        found, scope = self.find(name)
        if isinstance(found, onnx.NodeProto) and found.op_type == "Constant":
            found = scope.attributes(found).get("value")
        return found if isinstance(found, onnx.TensorProto) else None


_Functions = Mapping[tuple[str, str], onnx.FunctionProto]


def scoped_nodes(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, Scope]]:
    """Every node with its scope, in the order of the graph; those of a local function once for each call."""
    functions = {(f.domain, f.name): f for f in model.functions}
    yield from _walk(Scope.of(model.graph, None), model.graph.node, functions, 0)


def _walk(
    scope: Scope, nodes: Sequence[onnx.NodeProto], functions: _Functions, depth: int
) -> Iterator[tuple[onnx.NodeProto, Scope]]:
    for node in nodes:
        function = functions.get((node.domain, node.op_type))
        if function is None or depth >= MAX_DEPTH:
            yield node, scope
        if depth >= MAX_DEPTH:
            continue
        for graph in subgraphs(node):
            yield from _walk(Scope.of(graph, scope), graph.node, functions, depth + 1)
        if function is not None:
            yield from _walk(Scope.inside(function, node, scope), function.node, functions, depth + 1)
