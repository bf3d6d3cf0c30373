"""Which values of a graph can be FP16, derived from the type constraints in ONNX's own operator schemas.

Nothing here is a list of operators that lack FP16: a new operator, or a new version of one, is judged by its schema.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
from onnx import TensorProto, defs

from maskplan.exporters.half_range import is_qdq
from maskplan.exporters.subgraphs import subgraphs, walk_graphs, walk_nodes
from maskplan.pipeline.core.ort_session import open_session

_FP16, _FP32 = "tensor(float16)", "tensor(float)"
# The type of their output is an attribute that the conversion rewrites.
_CONVERTIBLE_SOURCES = ("Cast", "Constant", "ConstantOfShape")
# Casts from these to FP16 are exact, so that the result needs no FP32.
_NARROW = {
    TensorProto.BOOL,
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT4,
    TensorProto.UINT4,
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
}
_RUNTIME_TYPES = {_FP32: TensorProto.FLOAT, _FP16: TensorProto.FLOAT16, "tensor(int64)": TensorProto.INT64}


@dataclass(frozen=True)
class ValueTypes:
    """Element types of the values of a model's graphs.

    Attributes:
        elements: The ONNX element type by name, of tensors.
        containers: Names of sequences and optionals.
    """

    elements: Mapping[str, int]
    containers: frozenset[str] = field(default_factory=frozenset)

    @functools.cached_property
    def floats(self) -> frozenset[str]:
        """Names of the tensors in FP32."""
        return frozenset(name for name, kind in self.elements.items() if kind == TensorProto.FLOAT)

    def may_be_float(self, name: str) -> bool:
        """Whether a value is in FP32, or of unknown type."""
        return bool(self.elements.get(name, TensorProto.FLOAT) == TensorProto.FLOAT)


def infer_value_types(model: onnx.ModelProto) -> ValueTypes:
    """Types by ONNX's inference; where a custom operator ends it, by ONNX Runtime."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    elements: dict[str, int] = {}
    containers = set()
    # Outer graphs last: where an inner name is used again, the outer one counts.
    graphs = reversed((*walk_graphs(model.graph), *walk_graphs(graph)))
    for value in (value for g in graphs for value in (*g.value_info, *g.input, *g.output)):
        if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type:
            elements[value.name] = value.type.tensor_type.elem_type
        elif value.type.HasField("sequence_type") or value.type.HasField("optional_type"):
            containers.add(value.name)
    for inner in reversed((*walk_graphs(graph),)):
        elements |= {tensor.name: tensor.data_type for tensor in inner.initializer}
    elements |= {tensor.values.name: tensor.values.data_type for tensor in graph.sparse_initializer}
    unknown = [
        name for node in graph.node for name in node.output if name and name not in elements and name not in containers
    ]
    if unknown:
        elements |= _types_by_runtime(model, unknown)
    return ValueTypes(elements, frozenset(containers))


def _types_by_runtime(model: onnx.ModelProto, names: list[str]) -> dict[str, int]:
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    known = {output.name for output in probe.graph.output}
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    session = open_session(
        probe.SerializeToString(),
        model.graph.name,
        optimized=False,
        quiet=True,
        what="the types of some values are unknown: ONNX Runtime cannot load the model",
        fix="export with value types, or without custom operators",
    )
    return {output.name: _RUNTIME_TYPES.get(output.type, TensorProto.UNDEFINED) for output in session.get_outputs()}


@dataclass(frozen=True)
class _Parameter:
    variable: str
    allows_fp32: bool
    allows_fp16: bool


@dataclass(frozen=True)
class _Signature:
    """The formal parameters of an operator; a variadic one is the last and stands for all that follow."""

    inputs: tuple[_Parameter, ...]
    outputs: tuple[_Parameter, ...]

    def of(self, node: onnx.NodeProto) -> tuple[list[tuple[str, _Parameter]], list[tuple[str, _Parameter]]]:
        """The names that a node reads and returns, with their parameters; "" where one is left out."""
        return _pair(node.input, self.inputs), _pair(node.output, self.outputs)


class TypeRules:
    """The FP16 rules of one model, which depend on the opsets it imports."""

    def __init__(self, model: onnx.ModelProto, types: ValueTypes) -> None:
        self.types = types
        self._opsets = {entry.domain: entry.version for entry in model.opset_import}
        self._opsets.setdefault("", self._opsets.get("ai.onnx", 1))

    def reason_for_fp32(self, node: onnx.NodeProto) -> str | None:
        """Why a node must be FP32 as a whole, subgraphs included; None if it can be FP16."""
        names = [name for name in (*node.input, *node.output) if name]
        if self.types.containers.intersection(names):
            return "reads or returns a sequence"
        if (reason := self._own_reason(node)) is not None:
            return reason
        for inner in nested_nodes(node):
            if self.types.containers.intersection((*inner.input, *inner.output)):
                return f"contains {inner.op_type}, which reads or returns a sequence"
            # An inner node cannot be an island of its own.
            if self._own_reason(inner) or self.fp32_inputs(inner) or self.fp32_outputs(inner):
                return f"contains {inner.op_type}, which has values that must be FP32"
        return None

    def fp32_inputs(self, node: onnx.NodeProto) -> set[int]:
        """Indices of a node's inputs that are FP32 by definition, also where its data is FP16."""
        return self._fixed(node, 0)

    def fp32_outputs(self, node: onnx.NodeProto) -> set[int]:
        """Indices of a node's outputs that are FP32 by definition, also where its data is FP16."""
        return self._fixed(node, 1)

    def _own_reason(self, node: onnx.NodeProto) -> str | None:
        names = [name for name in (*node.input, *node.output) if name]
        if is_qdq(node) or not any(map(self.types.may_be_float, names)):
            return None
        signature = self._signature(node)
        if signature is None:
            return "ONNX does not define the operator"
        inputs, outputs = ([(n, p) for n, p in pairs if n] for pairs in signature.of(node))
        floats = [p for n, p in (*inputs, *outputs) if p.allows_fp32 and self.types.may_be_float(n)]
        # The first float carries the data: if it cannot be FP16, nothing in the node is.
        if floats and not floats[0].allows_fp16:
            return "ONNX does not define the operator for FP16"
        if node.op_type in _CONVERTIBLE_SOURCES:
            return "converts a type that may exceed FP16" if self._is_wide_cast(node) else None
        if any(True for _ in subgraphs(node)):
            return None
        variables = {p.variable for _, p in inputs}
        if any(p.allows_fp16 and self.types.may_be_float(n) and p.variable not in variables for n, p in outputs):
            return "an attribute sets the type of its output"
        return None

    def _is_wide_cast(self, node: onnx.NodeProto) -> bool:
        """Whether a node casts a type with more range than FP16, such as a size in INT64, to FP32."""
        elements = self.types.elements
        if node.op_type != "Cast" or elements.get(node.output[0]) != TensorProto.FLOAT:
            return False
        return elements.get(node.input[0], TensorProto.UNDEFINED) not in _NARROW

    def _fixed(self, node: onnx.NodeProto, side: int) -> set[int]:
        signature = self._signature(node)
        if signature is None:
            return set()
        return {
            i
            for i, (name, p) in enumerate(signature.of(node)[side])
            if name and p.allows_fp32 and not p.allows_fp16 and self.types.may_be_float(name)
        }

    def _signature(self, node: onnx.NodeProto) -> _Signature | None:
        domain = "" if node.domain == "ai.onnx" else node.domain
        return _signature(node.op_type, self._opsets.get(domain, 1), domain)


def nested_nodes(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """All nodes inside a node's subgraphs."""
    for graph in subgraphs(node):
        yield from walk_nodes(graph.node)


@functools.cache
def _signature(op_type: str, opset: int, domain: str) -> _Signature | None:
    """By the schema that is valid in an opset; None for an operator that ONNX does not define."""
    try:
        schema = defs.get_schema(op_type, opset, domain)
    except defs.SchemaError:
        return None
    allowed = {c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints}

    def parameter(formal: defs.OpSchema.FormalParameter) -> _Parameter:
        types = allowed.get(formal.type_str, frozenset((formal.type_str,)))
        return _Parameter(formal.type_str, _FP32 in types, _FP16 in types)

    return _Signature(tuple(map(parameter, schema.inputs)), tuple(map(parameter, schema.outputs)))


def _pair(names: Sequence[str], parameters: tuple[_Parameter, ...]) -> list[tuple[str, _Parameter]]:
    return [(name, parameters[min(i, len(parameters) - 1)]) for i, name in enumerate(names)] if parameters else []
