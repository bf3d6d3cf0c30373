"""Parse an ONNX file into a network; what the parser rejects is told in the words of the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskplan.engines.trt.log_capture import TrtLogCapture
from maskplan.engines.trt.messages import NO_PLUGIN, NOT_SUPPORTED, readable, way_out
from maskplan.engines.trt.versions import construct
from maskplan.pipeline.core.artifacts import OnnxModel
from maskplan.pipeline.core.errors import InputError, listed

if TYPE_CHECKING:
    import onnx

_NO_NODE = "export or copy the file again"


@dataclass(frozen=True)
class ParseProblem:
    """What the parser rejects, and a way out.

    Attributes:
        node: Name of the ONNX node, or its first output if it has no name; empty if no node is at fault.
        op: Its operator.
        reason: Why it is rejected.
        fix: What to do.
    """

    node: str
    op: str
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"node {self.node} ({self.op}): {self.reason}" if self.op else self.reason


def parse(trt: Any, network: Any, onnx_model: OnnxModel, log_capture: TrtLogCapture) -> None:
    """Parse the file into the network.

    Raises:
        ParseError: The parser rejects it; the message lists every node at fault.
        InputError: The file refers to data that is missing or outside its folder, which the library would read.
        HostError: The parser does not start.
    """
    _require_own_data(onnx_model.path)
    parser = construct(trt.OnnxParser, log_capture, network)
    redeclared = _redeclared(onnx_model)
    if redeclared is None:
        parsed = parser.parse_from_file(str(onnx_model.path))
    else:
        parsed = parser.parse(redeclared, str(onnx_model.path))
    if not parsed:
        raise ParseError(_problems(parser, onnx_model), onnx_model, log_capture)


def _redeclared(onnx_model: OnnxModel) -> bytes | None:
    """The graph with the shapes of the record; None if the file has the same."""
    from maskplan.exporters.metadata import load_onnx
    from maskplan.exporters.run_shapes import set_shapes

    try:
        model = load_onnx(onnx_model.path)
    except InputError:  # the parser describes it better
        return None
    return model.SerializeToString() if set_shapes(model, onnx_model.inputs, onnx_model.outputs) else None


def _require_own_data(path: Path) -> None:
    from maskplan.exporters.external_data import external_tensors, locate_external
    from maskplan.exporters.lazy_load import load_lazily

    for tensor in external_tensors(load_lazily(path)):
        locate_external(tensor, path.parent)


class ParseError(InputError):
    """The parser rejects the model; `problems` has each node at fault."""

    def __init__(self, problems: tuple[ParseProblem, ...], onnx_model: OnnxModel, log_capture: TrtLogCapture) -> None:
        self.problems = problems
        count = f"{len(problems)} problem{'' if len(problems) == 1 else 's'}"
        super().__init__(
            f"{log_capture.library.name} cannot parse the model: {count}",
            where=onnx_model.path,
            found=listed(problems) if problems else log_capture.reason(),
            fix="; ".join(dict.fromkeys(p.fix for p in problems)) or _NO_NODE,
        )


def _problems(parser: Any, onnx_model: OnnxModel) -> tuple[ParseProblem, ...]:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    if not errors:
        return ()
    nodes = _nodes_of(onnx_model) if any(e.node_operator() and not e.node_name() for e in errors) else ()
    return tuple(_problem(error, nodes) for error in errors)


def _problem(error: Any, nodes: tuple[onnx.NodeProto, ...]) -> ParseProblem:
    op, index, described = error.node_operator(), error.node(), error.desc()
    if not op:
        reason = readable(described)
        return ParseProblem("", "", reason, way_out(reason, _NO_NODE))
    name = error.node_name()
    if not name:
        # An index counts within a graph, which may be that of a branch or of a loop's body.
        unnamed = nodes[index] if 0 <= index < len(nodes) and nodes[index].op_type == op else None
        name = f"with the output {unnamed.output[0]!r}" if unnamed is not None and unnamed.output else f"number {index}"
    if "Plugin not found" in described:
        reason = NO_PLUGIN
    elif error.code().name == "UNSUPPORTED_NODE" and "Assertion" not in described:
        # The description of an operator without an importer is the condition that failed: `false`.
        reason = NOT_SUPPORTED
    else:
        reason = readable(described)
    return ParseProblem(name, op, reason, way_out(reason))


def _nodes_of(onnx_model: OnnxModel) -> tuple[onnx.NodeProto, ...]:
    from maskplan.exporters.metadata import load_onnx

    try:
        return tuple(load_onnx(onnx_model.path).graph.node)
    except InputError:
        return ()
