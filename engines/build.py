"""The build stage: ONNX file to engine, with the requested backend or the best available one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from maskplan.engines.base import Engine
from maskplan.engines.ort import OrtEngine, build_ort
from maskplan.engines.sidecar import read_engine, write_sidecar
from maskplan.engines.trt.calibrator import ImplicitInt8
from maskplan.engines.trt.cuda import gpu, has_driver
from maskplan.engines.trt.options import TrtOptions
from maskplan.engines.trt.versions import is_installed
from maskplan.exporters.run_shapes import run_shapes
from maskplan.pipeline.core.artifacts import EngineFile, OnnxModel, Profile, ShapeRange
from maskplan.pipeline.core.choices import AUTO, ONNXRUNTIME, TENSORRT, TENSORRT_RTX, Backend
from maskplan.pipeline.core.errors import HostError, InputError, PipelineError

DEFAULT_PROFILES = (Profile(1, 1, 1), Profile(1, 8, 8))
_SHAPE = re.compile(r":\d+(x\d+)+$")


def profiles_for(onnx_model: OnnxModel, batches: tuple[int, ...]) -> tuple[Profile, ...]:
    """One profile per batch size, since TensorRT tunes for a single size; a graph with a fixed batch has only one."""
    # A scalar has no batch.
    fixed = next((spec.shape[0] for spec in onnx_model.inputs if spec.shape), None)
    if fixed is not None:
        return (Profile(fixed, fixed, fixed),)
    return tuple(Profile(1, batch, batch) for batch in dict.fromkeys(batches))


@dataclass(frozen=True)
class BuildOptions:
    """How to build.

    Attributes:
        backend: The runtime to build for.
        profiles: Ranges of batch sizes; TensorRT tunes for `opt`.
        sparse_weights: Let the builder use sparse kernels where weights are 2:4.
        trt: Options of TensorRT and TensorRT-RTX only.
        implicit: Calibration images for TensorRT 10's implicit INT8 mode; None builds in the types of the graph.
    """

    backend: Backend
    profiles: tuple[Profile, ...] = DEFAULT_PROFILES
    sparse_weights: bool = True
    trt: TrtOptions = field(default_factory=TrtOptions)
    implicit: ImplicitInt8 | None = None


_Builder = Callable[[OnnxModel, BuildOptions, Path], EngineFile]


def _build_onnxruntime(onnx_model: OnnxModel, options: BuildOptions, out: Path) -> EngineFile:
    return build_ort(onnx_model, options.profiles, options.sparse_weights, out)


def _build_tensorrt(onnx_model: OnnxModel, options: BuildOptions, out: Path) -> EngineFile:
    from maskplan.engines.trt.build import build_trt

    return build_trt(
        onnx_model,
        options.profiles,
        options.sparse_weights,
        options.trt,
        out,
        options.implicit,
        backend=options.backend,
    )


def _open_tensorrt(engine: EngineFile) -> Engine:
    from maskplan.engines.trt.run import TrtEngine

    return TrtEngine(engine)


BACKENDS: dict[Backend, _Builder] = {
    ONNXRUNTIME: _build_onnxruntime,
    TENSORRT: _build_tensorrt,
    TENSORRT_RTX: _build_tensorrt,
}
_OPENERS: dict[Backend, Callable[[EngineFile], Engine]] = {
    ONNXRUNTIME: lambda engine: OrtEngine(engine.path),
    TENSORRT: _open_tensorrt,
    TENSORRT_RTX: _open_tensorrt,
}
SUFFIX: dict[Backend, str] = {ONNXRUNTIME: ".onnx", TENSORRT: ".plan", TENSORRT_RTX: ".rtx.plan"}


def choose_backend(requested: str) -> tuple[Backend, str]:
    """Choose the backend and give the reason, without importing any runtime.

    Args:
        requested: A backend, or `auto`.

    Raises:
        InputError: `requested` is neither.
    """
    for backend in BACKENDS:
        if requested == backend:
            return backend, "requested"
    if requested != AUTO:
        raise InputError(f"unknown backend {requested!r}", fix=f"choose one of {', '.join([AUTO, *BACKENDS])}")
    if not is_installed("tensorrt"):
        return ONNXRUNTIME, "TensorRT is not installed"
    if not is_installed("pycuda"):
        return ONNXRUNTIME, "TensorRT is installed, but pycuda, which is required to run its engines, is not"
    if not has_driver():
        return ONNXRUNTIME, "TensorRT and pycuda are installed, but the NVIDIA driver is not"
    return TENSORRT, "TensorRT, pycuda and an NVIDIA driver are installed"


def build_engine(onnx_model: OnnxModel, options: BuildOptions, out: Path) -> EngineFile:
    """Build an engine; write it and its sidecar.

    Its inputs and outputs have the shapes that the graph has when it runs, if these are not the declared ones.

    Raises:
        InputError: The backend rejects the model.
        HostError: The backend is not available on this host.
    """
    found = run_shapes(onnx_model)
    fixed = next((spec.shape[0] for spec in found.inputs if spec.shape), None)
    if found.inputs != onnx_model.inputs and fixed is not None:
        options = replace(options, profiles=(Profile(fixed, fixed, fixed),))
    onnx_model = replace(onnx_model, inputs=found.inputs, outputs=found.outputs)
    engine = BACKENDS[options.backend](onnx_model, options, out)
    engine = replace(engine, batched=found.batched, notes=(*found.notes, *engine.notes))
    write_sidecar(engine)
    return engine


def open_engine(engine: EngineFile | Path) -> Engine:
    """Load an engine after checking its digest against the sidecar.

    Raises:
        InputError: The file is missing, or does not match its sidecar.
        HostError: Its runtime is not installed.
    """
    record = read_engine(engine.path if isinstance(engine, EngineFile) else engine)
    if record.backend not in _OPENERS:
        raise InputError(
            "the engine's sidecar cannot be read",
            where=record.path,
            found=f"backend {record.backend!r}",
            fix="build the engine again",
        )
    return _OPENERS[record.backend](record)


def why_not_runnable(engine: EngineFile) -> str | None:
    """Why an engine that was built without a GPU does not run on this host; None if it runs, or was built where it runs."""
    if engine.backend != TENSORRT_RTX:
        return None
    try:
        open_engine(engine).close()
    except PipelineError as error:
        return error.what if error.found is None else f"{error.what}: {error.found}"
    return None


def device_of(engine: EngineFile) -> str:
    """What runs an engine: for a plan of TensorRT-RTX this host's GPU, where there is one, else what it was built for."""
    if engine.backend != TENSORRT_RTX or not has_driver():
        return engine.device
    try:
        return gpu().name
    except HostError:
        return engine.device


def is_foreign(engine: EngineFile) -> bool:
    """Whether an engine was built for another GPU or version of its library; False if this cannot be determined here."""
    if engine.backend == ONNXRUNTIME:
        return False
    from maskplan.engines.trt.host import is_foreign as is_foreign_plan

    return is_foreign_plan(engine)


def parse_profile(text: str) -> Profile:
    """`"1:8:32"` to batch sizes, `"8"` means 8:8:8; `"input:1x3x320x320:8x3x640x640:8x3x1280x1280"` to shapes of inputs.

    Shapes of several inputs are separated by commas, as trtexec and Polygraphy write them. The batch sizes are then those of
    the first of them.

    Raises:
        InputError: Not MIN:OPT:MAX in ascending order, or an input is given twice.
    """
    if "x" in text:
        ranges = tuple(_parse_range(part, text) for part in text.split(","))
        if len({r.name for r in ranges}) < len(ranges):
            raise _invalid_shapes(text, "give each input once, as NAME:MIN:OPT:MAX")
        first = ranges[0]
        return Profile(first.min[0], first.opt[0], first.max[0], ranges)
    parts = text.split(":")
    if len(parts) in (1, 3) and all(p.isdecimal() for p in parts):
        low, best, high = (int(p) for p in (parts * 3 if len(parts) == 1 else parts))
        if 1 <= low <= best <= high:
            return Profile(low, best, high)
    raise InputError(
        "invalid profile",
        found=repr(text),
        fix="write batch sizes as MIN:OPT:MAX, for example 1:8:32, or shapes as NAME:MIN:OPT:MAX, for example"
        " input:1x3x320x320:8x3x640x640:8x3x1280x1280",
    )


def _parse_range(text: str, whole: str) -> ShapeRange:
    name, *parts = text.rsplit(":", 3) if text.count(":") >= 3 else text.rsplit(":", 1)
    sizes = [part.split("x") for part in parts]
    # Two shapes are neither one nor three: the first is no end of a name such as `input:0`.
    is_name = bool(name) and not _SHAPE.search(name)
    if is_name and parts and all(size.isdecimal() and int(size) > 0 for shape in sizes for size in shape):
        low, best, high = (tuple(map(int, shape)) for shape in (sizes * 3 if len(sizes) == 1 else sizes))
        ascending = len(low) == len(best) == len(high)
        if ascending and all(a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
            return ShapeRange(name, low, best, high)
    example = "input:1x3x320x320:8x3x640x640:8x3x1280x1280"
    raise _invalid_shapes(whole, f"write shapes in ascending order as NAME:MIN:OPT:MAX, for example {example}")


def _invalid_shapes(text: str, fix: str) -> InputError:
    return InputError("invalid profile", found=repr(text), fix=fix)
