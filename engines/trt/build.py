"""ONNX to a TensorRT plan: a strongly typed network, with the sparse-weights flag."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pipeline.artifacts import EngineFile, OnnxModel, Profile, TensorSpec
from pipeline.errors import HostError, InputError
from pipeline.files import write_atomically


def import_tensorrt() -> Any:
    """TensorRT's Python package.

    Raises:
        HostError: It is not installed, or its libraries do not load.
    """
    try:
        import tensorrt
    except (ImportError, OSError, RuntimeError) as error:
        raise HostError(
            "TensorRT is not here",
            found=f"{type(error).__name__}: {error}",
            fix="on a GPU host: pip install 'maskplan[tensorrt]'; finished stages can be copied there",
        ) from error
    return tensorrt


def build_trt(onnx_model: OnnxModel, profiles: tuple[Profile, ...], sparse_weights: bool, out: Path) -> EngineFile:
    """Build a plan with one optimisation profile for each of `profiles`.

    Raises:
        HostError: TensorRT or a GPU is missing.
        InputError: TensorRT cannot parse or build the model; its own messages are quoted.
    """
    trt = import_tensorrt()
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxPath
    from polygraphy.backend.trt import Profile as TrtProfile
    from polygraphy.exception import PolygraphyException

    started = time.perf_counter()
    shapes = []
    for profile in profiles:
        shape = TrtProfile()
        for spec in onnx_model.inputs:
            shape.add(spec.name, *(_with_batch(spec, batch) for batch in (profile.min, profile.opt, profile.max)))
        shapes.append(shape)
    config = CreateConfig(
        profiles=shapes, sparse_weights=sparse_weights, profiling_verbosity=trt.ProfilingVerbosity.DETAILED
    )
    try:
        network = NetworkFromOnnxPath(str(onnx_model.path), strongly_typed=True)
        plan = bytes(EngineBytesFromNetwork(network, config=config)())
    except PolygraphyException as error:
        raise InputError(
            "TensorRT cannot build the model",
            where=onnx_model.path,
            found=str(error),
            fix="see TensorRT's messages above; `maskplan check` shows whether the weights conform",
        ) from error
    sha256 = write_atomically(out, plan)
    device, capability = _device()
    notes: tuple[str, ...] = ()
    if sparse_weights and onnx_model.precision == "fp32":
        notes = ("an FP32 graph: TensorRT documents sparse kernels for FP16 and INT8 only",)
    return EngineFile(
        path=out,
        sha256=sha256,
        bytes=len(plan),
        backend="tensorrt",
        precision=onnx_model.precision,
        runtime_version=str(trt.__version__),
        device=device,
        compute_capability=capability,
        device_memory_bytes=None,
        sparse_weights=sparse_weights,
        typing="strong",
        profiles=profiles,
        inputs=onnx_model.inputs,
        outputs=onnx_model.outputs,
        onnx_sha256=onnx_model.sha256,
        build_s=round(time.perf_counter() - started, 3),
        provenance=onnx_model.provenance,
        notes=notes,
    )


def _with_batch(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    rest = spec.shape[1:]
    if any(d is None for d in rest):
        raise InputError(
            "only the batch may be dynamic",
            where=spec.name,
            found=spec.shape,
            fix="export with fixed image sizes",
        )
    return (batch, *(d for d in rest if d is not None))


def _device() -> tuple[str, str | None]:
    """The GPU's name and compute capability, through pycuda where it is installed."""
    try:
        import pycuda.driver as cuda
    except (ImportError, OSError, RuntimeError):
        return "GPU", None
    cuda.init()
    gpu = cuda.Device(0)
    return str(gpu.name()), "{}.{}".format(*gpu.compute_capability())
