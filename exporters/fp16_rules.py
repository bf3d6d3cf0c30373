"""Which nodes of a graph stay FP32, and why: by type constraints, constants, sizes and indices, scales, and on request."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Sequence

import onnx
from onnx import TensorProto

from maskplan.exporters.fp16_constants import MOVES_VALUES, find_bad_constants
from maskplan.exporters.fp16_types import TypeRules, ValueTypes, nested_nodes
from maskplan.exporters.fp32_islands import NodePrecision, reads
from maskplan.exporters.half_range import NON_INCREASING_OPS, unrepresentable_scales
from maskplan.exporters.subgraphs import walk_nodes
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.weight_ops import WEIGHT_OPS

# Engines fuse them into the layer before, which a cast in between would prevent: they join that layer's island.
_FUSED_AFTER = ("Clip", "LeakyRelu", "QuantizeLinear", "Relu")

# Float inputs, by position, that determine the size of the output or an index. Integers determine all others.
_SIZE_INPUTS = {"OneHot": (0, 1), "Range": (0, 1, 2), "Resize": (1, 2), "Upsample": (1,)}
_CONDITIONS = {"If": (0,), "Loop": (1,)}
_INTEGERS = {
    getattr(TensorProto, name) for name in ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
}
# The arithmetic of a size ends at the network's activations.
_ACTIVATION_OPS = {
    *WEIGHT_OPS,
    "AveragePool",
    "BatchNormalization",
    "Elu",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "InstanceNormalization",
    "LayerNormalization",
    "LeakyRelu",
    "MaxPool",
    "PRelu",
    "Relu",
    "Softmax",
}

# Between a constant such as 1e-12 and the division that it protects.
_RATIO_FORWARD = {"Abs", "Add", "Clip", "Exp", "Max", "Min", "Pow", "Reciprocal", "Sqrt", "Sub", "Where", *MOVES_VALUES}
# Nodes that make a small divisor of activations: where these run in FP16, the divisor itself vanishes.
_RATIO_BACKWARD = {
    "Abs",
    "Add",
    "Exp",
    "Max",
    "Mul",
    "Pow",
    "ReduceL1",
    "ReduceL2",
    "ReduceMean",
    "ReduceSum",
    "ReduceSumSquare",
    "Sqrt",
    *MOVES_VALUES,
}
# Values beyond FP16 go through these; others, such as Softmax, return values within it.
_RANGE_FORWARD = {"Add", "Concat", "Div", "Max", "Min", "Mul", "Neg", "Pad", "Sub", "Sum", "Where", *MOVES_VALUES}


class Fp32Choice:
    """The nodes of a main graph that stay FP32, with their reasons."""

    def __init__(self, graph: onnx.GraphProto, types: ValueTypes, rules: TypeRules) -> None:
        self.graph = graph
        self.types = types
        self.rules = rules
        self.reasons: dict[int, str] = {}
        self._producers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
        self._readers: dict[str, list[int]] = {}
        for i, node in enumerate(graph.node):
            for name in dict.fromkeys(reads(node)):
                self._readers.setdefault(name, []).append(i)

    def precisions(self) -> list[NodePrecision]:
        """What of each node is FP32."""
        return [
            NodePrecision(is_fp32=True)
            if i in self.reasons
            else NodePrecision(
                inputs=frozenset(self.rules.fp32_inputs(node)), outputs=frozenset(self.rules.fp32_outputs(node))
            )
            for i, node in enumerate(self.graph.node)
        ]

    def described(self) -> dict[str, str]:
        """Reasons by the names of nodes, for reports; without nodes that compute no floats."""
        nodes = ((self.graph.node[i], reason) for i, reason in sorted(self.reasons.items()))
        return {
            node.name or next(filter(None, node.output)): f"{node.op_type}, {reason}"
            for node, reason in nodes
            if node.op_type not in ("Constant", "Shape")
        }

    def by_types(self) -> None:
        """Operators that ONNX does not define for FP16, and casts of types with a larger range, with their readers."""
        sparse = {tensor.values.name for tensor in self.graph.sparse_initializer}
        for i, node in enumerate(self.graph.node):
            reason = self.rules.reason_for_fp32(node)
            if reason is not None:
                self._add(i, reason)
                if node.op_type == "Cast":
                    self._add_readers(node.output, "reads a value of a type that may exceed FP16")
            elif sparse.intersection(reads(node)):
                self._add(i, "reads a sparse tensor")

    def by_constants(self) -> None:
        """Nodes whose constants FP16 cannot represent, and those for which the result matters."""
        bad = find_bad_constants(self.graph)
        for i, reason in bad.reasons.items():
            self._add(i, reason)
        for name in bad.names:
            # Nodes that only move the constant would round it.
            self._add_sources([name], MOVES_VALUES | {"ConstantOfShape"}, f"moves {name}")
        ratios = [n for n in bad.vanishing if self._op(n) in _RATIO_FORWARD | {"Clip", "Max"}]
        self._follow(ratios, _RATIO_FORWARD, "computes with a value that vanishes in FP16")
        divisors = [name for n in ratios for name in self.graph.node[self._producers[n]].input]
        self._add_sources(divisors, _RATIO_BACKWARD, "computes a value that may vanish in FP16")
        large = [n for n in bad.overflowing if self._op(n) in _RANGE_FORWARD]
        # Dividing by a constant close to zero gives large values as well.
        large += [n for n in bad.vanishing if self._op(n) in ("Div", "Reciprocal")]
        self._follow(large, _RANGE_FORWARD, "computes with a value that exceeds FP16")

    def by_sizes(self) -> None:
        """Arithmetic that leads to a size, an index or a count."""
        targets: list[str] = []
        for outer in self.graph.node:
            for node in walk_nodes([outer]):
                inputs = _SIZE_INPUTS.get(node.op_type, ())
                if self._casts_to_integer(node):
                    inputs = (0,)
                targets += [node.input[i] for i in inputs if i < len(node.input) and self._is_float(node.input[i])]
            conditions = [outer.input[i] for i in _CONDITIONS.get(outer.op_type, ()) if i < len(outer.input)]
            targets += self._compared_floats(conditions)
        for i, node in enumerate(self.graph.node):
            if self._casts_to_integer(node):
                self._add(i, "its output is an integer")
            elif any(self._casts_to_integer(inner) for inner in nested_nodes(node)):
                self._add(i, "contains arithmetic that leads to integers")
            elif node.op_type == "Loop" and any(map(self._compares_floats, nested_nodes(node))):
                self._add(i, "contains comparisons that may end it")
                targets += reads(node)
        self._add_sources(targets, None, "leads to a size, an index or a count")

    def by_scales(self) -> dict[str, tuple[str, ...]]:
        """Q/DQ nodes whose scales FP16 cannot represent, with the layers they quantize; the problems by description."""
        scales = unrepresentable_scales(self.graph)
        self._add_tensors(
            [name for names in scales.values() for name in names], "has a scale that FP16 cannot represent"
        )
        return scales

    def by_tensors(self, tensors: Collection[str]) -> None:
        """The nodes that produce or read some tensors, and the tensors from which these are pooled or reshaped."""
        self._add_tensors(tensors, "computes or reads an activation that exceeds or vanishes in FP16")

    def by_patterns(self, patterns: Collection[str]) -> None:
        """Nodes by their names; tensors by theirs, with the nodes that produce or read them.

        Raises:
            InputError: A pattern that matches nothing.
        """
        unmatched = []
        tensors = {name for node in self.graph.node for name in (*node.output, *reads(node)) if name}
        for pattern in patterns:
            nodes = [i for i, n in enumerate(self.graph.node) if n.name and fnmatch.fnmatchcase(n.name, pattern)]
            names = [name for name in tensors if fnmatch.fnmatchcase(name, pattern)]
            for i in nodes:
                self._add(i, f"kept by {pattern!r}")
            self._add_tensors(names, f"kept by {pattern!r}", with_sources=False)
            if not nodes and not names:
                unmatched.append(pattern)
        if unmatched:
            raise InputError(
                "these patterns match no node and no tensor",
                found=listed(map(repr, unmatched)),
                fix="name nodes or tensors of the main graph with --keep-fp32; `*` matches any characters",
            )

    def with_fused(self) -> None:
        """Add the nodes that engines fuse into a node that stays FP32."""
        for i, node in enumerate(self.graph.node):
            if i not in self.reasons and node.op_type in _FUSED_AFTER:
                producer = self._producers.get(node.input[0])
                if producer in self.reasons and self._computes_floats(self.graph.node[producer]):
                    self._add(i, "is fused into a layer in FP32")

    def _computes_floats(self, node: onnx.NodeProto) -> bool:
        return any(self._is_float(name) for name in node.output)

    def _add(self, index: int, reason: str) -> None:
        self.reasons.setdefault(index, reason)

    def _add_readers(self, names: Iterable[str], reason: str) -> None:
        for name in names:
            for i in self._readers.get(name, ()):
                self._add(i, reason)

    def _add_tensors(self, tensors: Collection[str], reason: str, *, with_sources: bool = True) -> None:
        wanted = set(tensors)
        for node in reversed(self.graph.node):
            if with_sources and node.op_type in NON_INCREASING_OPS and node.output[0] in wanted:
                wanted.add(node.input[0])
        for name in wanted:
            if (producer := self._producers.get(name)) is not None:
                self._add(producer, reason)
        self._add_readers(sorted(wanted), reason)

    def _follow(self, names: Sequence[str], ops: Collection[str], reason: str) -> None:
        """Add what reads some values, through the nodes with some operators to their readers."""
        pending, done = list(names), set()
        while pending:
            name = pending.pop()
            if name in done:
                continue
            done.add(name)
            for i in self._readers.get(name, ()):
                self._add(i, reason)
                if self.graph.node[i].op_type in ops:
                    pending += [output for output in self.graph.node[i].output if self._is_float(output)]

    def _add_sources(self, names: Sequence[str], ops: Collection[str] | None, reason: str) -> None:
        """Add the nodes from which some floats are computed, as far as they have some operators.

        None follows all operators up to the network's activations and up to values that are not floats.
        """
        pending, done = list(names), set()
        while pending:
            name = pending.pop()
            index = self._producers.get(name)
            if name in done or index is None or not self._is_float(name):
                continue
            done.add(name)
            node = self.graph.node[index]
            if node.op_type not in ops if ops is not None else node.op_type in _ACTIVATION_OPS:
                continue
            self._add(index, reason)
            pending += reads(node)

    def _compared_floats(self, conditions: Sequence[str]) -> list[str]:
        """The floats from which some truth values are computed."""
        floats: list[str] = []
        pending, done = list(conditions), set()
        while pending:
            name = pending.pop()
            index = self._producers.get(name)
            if name in done or index is None:
                continue
            done.add(name)
            if self._is_float(name):
                floats.append(name)
                continue
            node = self.graph.node[index]
            if any(self._is_float(read) for read in node.input):
                self._add(index, "leads to a condition")
            pending += node.input
        return floats

    def _casts_to_integer(self, node: onnx.NodeProto) -> bool:
        if node.op_type != "Cast" or not self._is_float(node.input[0]):
            return False
        return any(a.name == "to" and a.i in _INTEGERS for a in node.attribute)

    def _compares_floats(self, node: onnx.NodeProto) -> bool:
        returns_truth = any(self.types.elements.get(name) == TensorProto.BOOL for name in node.output)
        return returns_truth and any(self._is_float(name) for name in node.input)

    def _is_float(self, name: str) -> bool:
        return name in self.types.floats

    def _op(self, name: str) -> str:
        index = self._producers.get(name)
        return self.graph.node[index].op_type if index is not None else ""
