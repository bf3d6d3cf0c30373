"""A plan that trtexec made, taken in with the layer information that it wrote."""

from __future__ import annotations

from pathlib import Path

from engines.evidence import layers_of, with_reasons
from engines.trt.options import TrtOptions
from exporters.conformance import conforming_nodes
from pipeline.artifacts import EngineFile, OnnxModel, Profile
from pipeline.errors import InputError
from pipeline.files import read_bytes, write_atomically

UNKNOWN_DEVICE = "not told by trtexec"


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

    Args:
        onnx_model: The graph that it was built from.
        plan: What `--saveEngine` wrote.
        layer_info: What `--exportLayerInfo` wrote, with detailed verbosity.
        profiles: The profile that it was built for.
        sparse_weights: Whether sparse kernels were allowed.
        options: What else trtexec was given.
        version: TensorRT's, as in 10.13.3.9.
        capability: Of the GPU it was built on, as in 9.0; None leaves it unchecked.
        out: The engine to write.

    Raises:
        InputError: A file is missing, or the layer information cannot be read.
    """
    for path in (plan, layer_info):
        if not path.is_file():
            raise InputError("file not found", where=path, fix="give the files that trtexec wrote")
    data = read_bytes(plan)
    layers = with_reasons(
        layers_of(read_bytes(layer_info)),
        conforming=conforming_nodes(onnx_model.path),
        precision=onnx_model.precision,
        optimization_level=options.optimization_level,
    )
    return EngineFile(
        path=out,
        sha256=write_atomically(out, data),
        bytes=len(data),
        backend="tensorrt",
        precision=onnx_model.precision,
        runtime_version=version,
        device=UNKNOWN_DEVICE,
        compute_capability=capability,
        device_memory_bytes=None,
        sparse_weights=sparse_weights,
        typing="strong",
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        profiles=profiles,
        inputs=onnx_model.inputs,
        outputs=onnx_model.outputs,
        onnx_sha256=onnx_model.sha256,
        build_s=0.0,
        provenance=onnx_model.provenance,
        layers=layers,
        notes=("built by trtexec: what it was given is as told, not as seen",),
    )
