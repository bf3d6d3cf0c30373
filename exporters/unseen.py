"""Operators with weights that the 2:4 check does not read: fused and quantized ones of other tools, and custom ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from maskplan.exporters.scopes import STANDARD, Scope, scoped_nodes
from maskplan.exporters.tensors import is_numeric
from maskplan.exporters.weights import stored_behind
from maskplan.pipeline.core.weight_ops import DENSE_OPS, INTEGER_OPS

# Tables of custom operators that are no weights: anchors, grids, embeddings.
_TABLES = re.compile(r"nms|nonmax|anchor|prior|roi|grid|embed", re.IGNORECASE)
_RUNTIME_DOMAINS = ("com.microsoft", "com.ms.")


@dataclass(frozen=True)
class UnseenUse:
    """A use of a weight that cannot be judged.

    Attributes:
        name: The stored tensor; the node's operand if several tensors take part.
        node: Name of the node.
        op: Its type.
        tensor: The stored tensor, if it is one.
        can_be_sparse: False for operators of ONNX that never run 2:4, so that nothing is missed.
        hint: What to do about it.
    """

    name: str
    node: str
    op: str
    tensor: onnx.TensorProto | None
    can_be_sparse: bool
    hint: str


def unseen_uses(model: onnx.ModelProto) -> Iterator[UnseenUse]:
    """Every node with a stored matrix that is none of Conv, ConvTranspose, Gemm and MatMul, in the order of the graph."""
    for node, scope in scoped_nodes(model):
        found = _weight(node, scope)
        if found is None:
            continue
        name, tensor = found
        can_be_sparse = node.domain not in STANDARD or node.op_type not in DENSE_OPS
        own = node.name or (node.output[0] if node.output else node.op_type)
        yield UnseenUse(name, own, node.op_type, tensor, can_be_sparse, _hint(node) if can_be_sparse else "")


def _weight(node: onnx.NodeProto, scope: Scope) -> tuple[str, onnx.TensorProto | None] | None:
    if node.domain in STANDARD:
        operands = INTEGER_OPS.get(node.op_type, DENSE_OPS.get(node.op_type, ()))
    elif _TABLES.search(node.op_type):
        operands = ()
    else:
        operands = tuple(range(len(node.input)))
    for index in operands:
        name = node.input[index] if index < len(node.input) else ""
        found = stored_behind(name, scope) if name else None
        if found is not None and (found[1] is None or is_numeric(found[1])):
            return found
    return None


def _hint(node: onnx.NodeProto) -> str:
    if node.domain in STANDARD:
        return "an operator on integers, which TensorRT does not take: export with Q/DQ instead"
    if node.domain.startswith(_RUNTIME_DOMAINS):
        return "an operator of ONNX Runtime: give the file that it was made from"
    return f"an operator of the domain {node.domain}: its weights cannot be checked"
