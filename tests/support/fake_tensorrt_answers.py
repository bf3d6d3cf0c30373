"""The part of the fake TensorRT that answers: phases of a build, and what is said of graphs and profiles.

Names, words and orders are those that TensorRT-RTX 1.7.1 has, which shares its parser and its builder's front with TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx

# Names and words of the parser of TensorRT-RTX 1.7.1, which is TensorRT's.
PARSER_CODES = {
    "SUCCESS": 0,
    "INTERNAL_ERROR": 1,
    "MEM_ALLOC_FAILED": 2,
    "MODEL_DESERIALIZE_FAILED": 3,
    "INVALID_VALUE": 4,
    "INVALID_GRAPH": 5,
    "INVALID_NODE": 6,
    "UNSUPPORTED_GRAPH": 7,
    "UNSUPPORTED_NODE": 8,
}
NO_PLUGIN = 'creator && "Plugin not found, are the plugin name, version, and namespace correct?"'
_WITHOUT_IMPORTER = {"Det", "StringNormalizer", "Unique"}


def phases(monitor: Any, during_build: Callable[[], None]) -> bool:
    """Report phases as TensorRT-RTX 1.7.1 does: nested, and the outermost ends before the last step that it announced."""
    monitor.phase_start("Building engine", None, 3)
    during_build()
    if not monitor.step_complete("Building engine", 0):
        return False
    monitor.phase_start("Optimizing graph", "Building engine", 2)
    going = all(monitor.step_complete("Optimizing graph", step) for step in range(2))
    monitor.phase_finish("Optimizing graph")
    during_build()
    if not (going and monitor.step_complete("Building engine", 1)):
        return False
    monitor.phase_finish("Building engine")
    return True


def unsupported(model: onnx.ModelProto) -> list[tuple[str, str, int, str, str]]:
    """Errors of a parser for operators that it has no importer for, with its codes and words."""
    found = []
    for index, node in enumerate(model.graph.node):
        if node.op_type in _WITHOUT_IMPORTER:
            found.append(("UNSUPPORTED_NODE", "false", index, node.name, node.op_type))
        elif node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type):
            found.append(("INVALID_NODE", NO_PLUGIN, index, node.name, node.op_type))
    return found


def static_mismatch(value: onnx.ValueInfoProto, profiles: list[list[tuple[int, ...]]]) -> str:
    """What a builder says of a profile for dimensions that the network fixes; else nothing."""
    fixed = [d.dim_value or None for d in value.type.tensor_type.shape.dim]
    for number, shapes in enumerate(profiles):
        for axis, (size, *sizes) in enumerate(zip(fixed, *shapes, strict=True)):
            if size is not None and set(sizes) != {size}:
                return (
                    "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (Dimension mismatch for tensor"
                    f" {value.name} and profile {number}. At dimension axis {axis}, profile has {sizes} but tensor has"
                    f" {size}.)"
                )
    return ""
