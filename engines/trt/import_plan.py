"""A plan that trtexec made, taken in with the layer information that it wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from maskplan.engines.evidence import layers_of
from maskplan.engines.trt.options import TrtOptions
from maskplan.engines.trt.record import plan_record
from maskplan.engines.trt.trtexec import require_fitting
from maskplan.exporters.metadata import load_onnx
from maskplan.pipeline.core.artifacts import EngineFile, LayerSparsity, OnnxModel, Profile
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.files import read_bytes

UNKNOWN_DEVICE = "not told by trtexec"

_VERSION = re.compile(r"[0-9]+(?:\.[0-9]+){2,3}")
_CAPABILITY = re.compile(r"[0-9]+\.[0-9]+")
# The smallest network's plan is larger by far, and so is one without weights.
_LEAST_BYTES = 1024
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
    """The record of a plan whose build was not ours to watch; the plan is copied to `out`.

    What can be held against something is: the layers must be of the graph, the rest must at least look like what it is
    said to be.

    Args:
        onnx_model: The graph that it was built from.
        plan: What `--saveEngine` wrote.
        layer_info: What `--exportLayerInfo` wrote, with detailed verbosity.
        profiles: The one that it was built for.
        sparse_weights: Whether sparse kernels were allowed.
        options: What else trtexec was given.
        version: TensorRT's, as in 10.13.3.9.
        capability: Of the GPU it was built on, as in 9.0; None leaves it unchecked.
        out: The engine to write.

    Raises:
        InputError: A file is missing or cannot be what it is said to be, the layers are of another graph, or what is told
            cannot be.
    """
    _require_told(profiles, version, capability)
    require_fitting(onnx_model, profiles)
    for path in (plan, layer_info):
        if not path.is_file():
            raise InputError("file not found", where=path, fix="give the files that trtexec wrote")
    data = read_bytes(plan)
    if len(data) < _LEAST_BYTES:
        raise InputError(
            "too small for a plan",
            where=plan,
            found=f"{len(data)} bytes",
            fix="copy the whole file that `trtexec --saveEngine` wrote",
        )
    layers = _layers(layer_info)
    _require_same_graph(onnx_model, layers, layer_info)
    return plan_record(
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
        notes=("built by trtexec: what it was given is as told, not as seen",),
    )


def _require_told(profiles: tuple[Profile, ...], version: str, capability: str | None) -> None:
    problems = []
    if not _VERSION.fullmatch(version):
        problems.append(f"TensorRT's version {version!r}, which is written as in 10.13.3.9")
    if capability is not None and not _CAPABILITY.fullmatch(capability):
        problems.append(f"compute capability {capability!r}, which is written as in 9.0")
    if len(profiles) != 1:
        problems.append(f"profiles {', '.join(map(str, profiles)) or 'none'}, where trtexec takes one")
    if problems:
        raise InputError(
            "this cannot be what trtexec was given",
            found="; ".join(problems),
            fix="correct --trt-version, --compute-capability or --profile",
        )


def _layers(layer_info: Path) -> tuple[LayerSparsity, ...]:
    try:
        return layers_of(read_bytes(layer_info))
    except InputError as error:
        raise InputError(error.what, where=layer_info, found=error.found, fix=error.fix) from error


def _require_same_graph(onnx_model: OnnxModel, layers: Iterable[LayerSparsity], layer_info: Path) -> None:
    """A single node in common will do: names do not tell more, for layers are fused and some lose their names."""
    # The parser's name for a node without one.
    nodes = {n.name or f"node_of_{n.output[0]}" for n in load_onnx(onnx_model.path).graph.node if n.name or n.output}
    named: dict[str, None] = {}
    for layer in layers:
        named |= dict.fromkeys(layer.nodes)
        for ends in _SUBGRAPH.findall(layer.name):
            named |= dict.fromkeys(ends)
    if not nodes.intersection(named):
        raise InputError(
            "the layer information is of another model: it names no node of this one",
            where=layer_info,
            found=f"{listed(named, 3) or 'no names'}; {onnx_model.path} has {listed(sorted(nodes), 3)}",
            fix="give the ONNX file that the plan was built from, and the layer information of the same build",
        )
