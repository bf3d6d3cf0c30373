"""A plan and the record of it: written for plans that we or trtexec built, and held against what is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskplan.engines.evidence import with_reasons
from maskplan.engines.trt.options import TrtOptions
from maskplan.exporters.conformance import conforming_nodes
from maskplan.pipeline.core.artifacts import EngineFile, LayerSparsity, OnnxModel, Profile
from maskplan.pipeline.core.files import write_atomically


def plan_record(
    onnx_model: OnnxModel,
    plan: bytes,
    profiles: tuple[Profile, ...],
    sparse_weights: bool,
    options: TrtOptions,
    out: Path,
    *,
    layers: tuple[LayerSparsity, ...],
    runtime_version: str,
    device: str,
    compute_capability: str | None,
    device_memory_bytes: int | None = None,
    build_s: float = 0.0,
    notes: tuple[str, ...] = (),
    typing: str = "strong",
) -> EngineFile:
    """Write a plan to `out` and tell what it is; nothing is written when the graph cannot be read.

    Args:
        onnx_model: The graph that it was built from.
        plan: Its bytes.
        profiles: What it was built for, in order.
        sparse_weights: Whether sparse kernels were allowed.
        options: What else the builder was given.
        out: The file to write.
        layers: As the inspector tells them; why a layer runs dense is added here.
        runtime_version: TensorRT's.
        device: The GPU's name.
        compute_capability: The GPU's, as in 9.0; None where it is not known.
        device_memory_bytes: What one context takes.
        build_s: How long it took.
        notes: What a reader should know.
        typing: `weak` where types came from flags and not from the graph alone.
    """
    explained = with_reasons(
        layers,
        conforming=conforming_nodes(onnx_model.path),
        precision=onnx_model.precision,
        optimization_level=options.optimization_level,
    )
    return EngineFile(
        path=out,
        sha256=write_atomically(out, plan),
        bytes=len(plan),
        backend="tensorrt",
        precision=onnx_model.precision,
        runtime_version=runtime_version,
        device=device,
        compute_capability=compute_capability,
        device_memory_bytes=device_memory_bytes,
        sparse_weights=sparse_weights,
        typing=typing,
        profiles=profiles,
        inputs=onnx_model.inputs,
        outputs=onnx_model.outputs,
        onnx_sha256=onnx_model.sha256,
        build_s=build_s,
        provenance=onnx_model.provenance,
        layers=explained,
        notes=notes,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        refittable=options.refittable,
        strip_plan=options.strip_plan,
    )


def differences(trt: Any, plan: Any, engine: EngineFile) -> tuple[str, ...]:
    """What a deserialized plan has otherwise than its record: names, directions and types of tensors, or profiles."""
    types = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.BF16: "bfloat16",
        trt.DataType.INT8: "int8",
        trt.DataType.UINT8: "uint8",
        trt.DataType.INT32: "int32",
        trt.DataType.INT64: "int64",
        trt.DataType.BOOL: "bool",
    }
    modes = {trt.TensorIOMode.INPUT: "input", trt.TensorIOMode.OUTPUT: "output"}
    names = [plan.get_tensor_name(i) for i in range(plan.num_io_tensors)]
    found = {
        (
            modes.get(plan.get_tensor_mode(name), "tensor"),
            name,
            types.get(plan.get_tensor_dtype(name), "of another type"),
        )
        for name in names
    }
    told = {("input", s.name, s.dtype) for s in engine.inputs} | {("output", s.name, s.dtype) for s in engine.outputs}
    problems = [f"{' '.join(tensor)}, which the sidecar has not" for tensor in sorted(found - told)]
    problems += [f"no {' '.join(tensor)}" for tensor in sorted(told - found)]
    if plan.num_optimization_profiles != len(engine.profiles):
        problems.append(f"{plan.num_optimization_profiles} profiles, the sidecar has {len(engine.profiles)}")
    return tuple(problems)
