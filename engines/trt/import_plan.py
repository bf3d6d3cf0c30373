"""Import a plan built by trtexec, with the layer information that trtexec exported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from maskplan.engines.evidence import parse_layers
from maskplan.engines.trt.options import TrtOptions
from maskplan.engines.trt.record import write_plan
from maskplan.engines.trt.shapes import require_compatible_shapes
from maskplan.exporters.metadata import load_onnx
from maskplan.pipeline.core.artifacts import EngineFile, LayerSparsity, OnnxModel, Profile
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.files import read_bytes

UNKNOWN_DEVICE = "unknown (built by trtexec)"

_VERSION = re.compile(r"[0-9]+(?:\.[0-9]+){2,3}")
_CAPABILITY = re.compile(r"[0-9]+\.[0-9]+")
# Even plans of tiny networks and plans without weights are much larger.
_MIN_PLAN_BYTES = 1024
_SUBGRAPH = re.compile(r"\{ForeignNode\[(.+)\.\.\.(.+)\]\}")


def import_plan(
    onnx_model: OnnxModel,
    plan: Path,
    layer_info: Path,
    profiles: tuple[Profile, ...],
    sparse_weights: bool,
    options: TrtOptions,
    version: str,
    capability: str | None,
    out: Path,
) -> EngineFile:
    """Copy a plan that another tool built to `out` and create its record.

    The layer information must match the graph; the other arguments can only be checked for plausibility.

    Args:
        onnx_model: The graph from which the plan was built.
        plan: The output of `--saveEngine`.
        layer_info: The output of `--exportLayerInfo` with detailed profiling verbosity.
        profiles: The single profile of the build.
        sparse_weights: Whether sparse kernels were allowed.
        options: The other build options.
        version: TensorRT version, such as 10.13.3.9.
        capability: Compute capability of the build GPU, such as 9.0; None skips the check.
        out: The engine file to write.

    Raises:
        InputError: A file is missing or implausible, the layers belong to another graph, or an argument is malformed.
    """
    _require_valid_arguments(profiles, version, capability)
    require_compatible_shapes(onnx_model, profiles)
    for path in (plan, layer_info):
        if not path.is_file():
            raise InputError("file not found", where=path, fix="use the files that trtexec wrote")
    data = read_bytes(plan)
    if len(data) < _MIN_PLAN_BYTES:
        raise InputError(
            "the file is too small for a plan",
            where=plan,
            found=f"{len(data)} bytes",
            fix="copy the complete file that `trtexec --saveEngine` wrote",
        )
    layers = _layers(layer_info)
    _require_same_graph(onnx_model, layers, layer_info)
    return write_plan(
        onnx_model,
        data,
        profiles,
        sparse_weights,
        options,
        out,
        layers=layers,
        runtime_version=version,
        device=UNKNOWN_DEVICE,
        compute_capability=capability,
        notes=("built by trtexec: the build options are as stated, not verified",),
    )


def _require_valid_arguments(profiles: tuple[Profile, ...], version: str, capability: str | None) -> None:
    problems = []
    if not _VERSION.fullmatch(version):
        problems.append(f"TensorRT version {version!r}, expected a form such as 10.13.3.9")
    if capability is not None and not _CAPABILITY.fullmatch(capability):
        problems.append(f"compute capability {capability!r}, expected a form such as 9.0")
    if len(profiles) != 1:
        problems.append(f"profiles {', '.join(map(str, profiles)) or 'none'}, expected exactly one")
    if problems:
        raise InputError(
            "invalid arguments of the trtexec build",
            found="; ".join(problems),
            fix="correct --trt-version, --compute-capability or --profile",
        )


def _layers(layer_info: Path) -> tuple[LayerSparsity, ...]:
    try:
        return parse_layers(read_bytes(layer_info))
    except InputError as error:
        raise InputError(error.what, where=layer_info, found=error.found, fix=error.fix) from error


def _require_same_graph(onnx_model: OnnxModel, layers: Iterable[LayerSparsity], layer_info: Path) -> None:
    """Require one common node name; more cannot be required, since fused layers lose names."""
    # TensorRT's parser names unnamed nodes after their first output.
    nodes = {n.name or f"node_of_{n.output[0]}" for n in load_onnx(onnx_model.path).graph.node if n.name or n.output}
    layer_nodes: dict[str, None] = {}
    for layer in layers:
        layer_nodes |= dict.fromkeys(layer.nodes)
        for ends in _SUBGRAPH.findall(layer.name):
            layer_nodes |= dict.fromkeys(ends)
    if not nodes.intersection(layer_nodes):
        raise InputError(
            "the layer information belongs to another model: it has no node of this one",
            where=layer_info,
            found=f"{listed(layer_nodes, 3) or 'no names'}; {onnx_model.path} has {listed(sorted(nodes), 3)}",
            fix="use the ONNX file from which the plan was built, and the layer information of the same build",
        )
