"""Write plans with their records, and compare a loaded plan with its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from maskplan.engines.evidence import with_reasons
from maskplan.engines.trt.options import TrtOptions
from maskplan.exporters.conformance import conforming_nodes
from maskplan.pipeline.core.artifacts import EngineFile, LayerSparsity, OnnxModel, Profile
from maskplan.pipeline.core.choices import TENSORRT, Backend, SparseFlagEffect
from maskplan.pipeline.core.files import write_atomically


def write_plan(
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
    typing: Literal["strong", "weak"] = "strong",
    backend: Backend = TENSORRT,
    sparse_flag: SparseFlagEffect | None = None,
) -> EngineFile:
    """Write a plan to `out` and return its record; nothing is written if the graph cannot be read.

    Args:
        onnx_model: The graph from which it was built.
        plan: The serialized plan.
        profiles: Its optimization profiles, in order.
        sparse_weights: Whether sparse kernels were allowed.
        options: The other build options.
        out: The file to write.
        layers: From the inspector; reasons for dense layers are added here.
        runtime_version: Version of the library.
        device: Name of the GPU, or the GPUs that the plan is for.
        compute_capability: Of the GPU, such as 9.0; None if unknown or for several.
        device_memory_bytes: Device memory of one context.
        build_s: Duration of the build in seconds.
        notes: Remarks for the user.
        typing: `strong` if types come from the graph alone, `weak` if from builder flags.
        backend: `tensorrt` or `tensorrt-rtx`.
        sparse_flag: What the sparse flag changed, where that was measured.
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
        backend=backend,
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
        targets=options.targets,
        sparse_flag=sparse_flag,
    )


def plan_mismatches(trt: Any, plan: Any, engine: EngineFile) -> tuple[str, ...]:
    """Compare a deserialized plan with its record: names, directions and dtypes of tensors, number of profiles."""
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
    actual = {
        (
            modes.get(plan.get_tensor_mode(name), "tensor"),
            name,
            types.get(plan.get_tensor_dtype(name), "of another dtype"),
        )
        for name in names
    }
    recorded = {("input", s.name, s.dtype) for s in engine.inputs} | {
        ("output", s.name, s.dtype) for s in engine.outputs
    }
    problems = [f"{' '.join(tensor)}, which is not in the sidecar" for tensor in sorted(actual - recorded)]
    problems += [f"no {' '.join(tensor)}" for tensor in sorted(recorded - actual)]
    if plan.num_optimization_profiles != len(engine.profiles):
        problems.append(f"{plan.num_optimization_profiles} profiles, the sidecar has {len(engine.profiles)}")
    return tuple(problems)
