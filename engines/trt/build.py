"""ONNX to a plan of TensorRT or TensorRT-RTX: a strongly typed network, with the sparse-weights flag."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from maskplan.engines.evidence import parse_layers, parse_sparsity_log
from maskplan.engines.trt.calibrator import ImplicitInt8, calibrating
from maskplan.engines.trt.cuda import gpu
from maskplan.engines.trt.log_capture import TrtLogCapture
from maskplan.engines.trt.options import MIN_LEVEL_FOR_SPARSE, TrtOptions
from maskplan.engines.trt.parse import parse
from maskplan.engines.trt.progress import progress_monitor
from maskplan.engines.trt.record import write_plan
from maskplan.engines.trt.shapes import require_compatible_shapes, shapes_of
from maskplan.engines.trt.timing_cache import load_timing_cache, save_timing_cache
from maskplan.engines.trt.versions import (
    LIBRARIES,
    Library,
    construct,
    import_library,
    member,
    network_flags,
    require_supported,
    set_targets,
)
from maskplan.pipeline.core.artifacts import EngineFile, LayerSparsity, OnnxModel, Profile
from maskplan.pipeline.core.choices import (
    INT8,
    OTHER_BYTES,
    SAME_BYTES,
    SAME_CONTENT,
    TENSORRT,
    Backend,
    SparseFlagEffect,
)
from maskplan.pipeline.core.errors import HostError, InputError, PipelineError

log = logging.getLogger(__name__)

FP32_NOTE = "the graph is FP32: TensorRT documents sparse kernels for FP16 and INT8 only"


class BuildError(InputError):
    """The library does not build the model, which its parser has accepted; `found` quotes its messages."""


_NUMBERED = re.compile(rb"(__mye)[0-9]+")
_MAX_REPEATS = 5


def build_trt(
    onnx_model: OnnxModel,
    profiles: tuple[Profile, ...],
    sparse_weights: bool,
    options: TrtOptions,
    out: Path,
    implicit: ImplicitInt8 | None = None,
    *,
    backend: Backend = TENSORRT,
    log_capture: TrtLogCapture | None = None,
) -> EngineFile:
    """Build a plan with one optimization profile for each of `profiles`; with `implicit`, a weakly typed one in INT8.

    A plan that cannot be inspected is kept, because its build took minutes; a note in its record says so.

    Args:
        onnx_model: The graph.
        profiles: Ranges of batch sizes.
        sparse_weights: Set the sparse flag.
        options: The other options.
        out: The file to write.
        implicit: Calibration images for the implicit INT8 mode.
        backend: `tensorrt` or `tensorrt-rtx`.
        log_capture: Captures what the library logs while it compiles; by default a new one.

    Raises:
        HostError: The library or a GPU that it needs is missing, its memory is insufficient, or the timing cache is locked.
        InputError: The library does not take an option or a profile, or cannot parse or build the model; the message quotes
            its errors.
    """
    trt = import_library(backend)
    library = LIBRARIES[backend]
    require_supported(backend, options, implicit_int8=implicit is not None)
    device = gpu() if library.builds_on_gpu else None
    require_compatible_shapes(onnx_model, profiles)
    log_capture = TrtLogCapture(trt) if log_capture is None else log_capture
    if implicit is not None:
        onnx_model = replace(onnx_model, precision=INT8)
    warnings = _warnings(onnx_model, sparse_weights, options) if library.builds_on_gpu else ()
    started = time.perf_counter()
    plan = compile_plan(trt, onnx_model, profiles, sparse_weights, options, log_capture, implicit)
    build_s = round(time.perf_counter() - started, 3)
    log_capture.stop()
    sparse_flag: SparseFlagEffect | None = None
    if library.builds_on_gpu:
        layers, device_memory_bytes, failure = _inspect(trt, plan, options)
        warnings += failure
    else:
        layers, device_memory_bytes = (), None
        if sparse_weights:
            sparse_flag = _flag_effect(
                plan,
                lambda sparse: compile_plan(trt, onnx_model, profiles, sparse, options, TrtLogCapture(trt, quiet=True)),
            )
    for note in warnings:
        log.warning("%s", note)
    return write_plan(
        onnx_model,
        plan,
        profiles,
        sparse_weights,
        options,
        out,
        backend=backend,
        layers=layers,
        runtime_version=str(trt.__version__),
        device=device.name if device is not None else _device_of(options),
        compute_capability=device.compute_capability if device is not None else None,
        device_memory_bytes=device_memory_bytes,
        build_s=build_s,
        notes=(*warnings, *_sparsity_notes(log_capture), *_flag_note(library, trt, sparse_weights, sparse_flag)),
        typing="strong" if implicit is None else "weak",
        sparse_flag=sparse_flag,
    )


def _device_of(options: TrtOptions) -> str:
    """The GPUs that a plan is for whose build needed none."""
    if not options.targets:
        return "GPUs from compute capability 8.0 on (9.0 not promised)"
    return f"GPUs of compute capability {', '.join(options.capabilities)}"


def _flag_effect(plan: bytes, compile_again: Callable[[bool], bytes]) -> SparseFlagEffect | None:
    """What the sparse flag changes in a plan: compare builds with and without it; None if they cannot tell.

    Builds with the same options may differ (INT8 graphs with a dynamic batch, sm75): the compiler numbers its own tensors as
    it goes, and longer numbers move what follows. A few builds of each kind are enough for two that have the same numbers.
    """
    without = compile_again(False)
    if plan == without:
        return SAME_BYTES
    with_flag, without_flag = [_without_numbers(plan)], [_without_numbers(without)]
    for _ in range(_MAX_REPEATS):
        if set(with_flag) & set(without_flag):
            return SAME_CONTENT
        with_flag.append(_without_numbers(compile_again(True)))
        without_flag.append(_without_numbers(compile_again(False)))
    if set(with_flag) & set(without_flag):
        return SAME_CONTENT
    return OTHER_BYTES if len(set(with_flag)) == len(set(without_flag)) == 1 else None


def _without_numbers(plan: bytes) -> str:
    """Digest of a plan without the numbers of the compiler's own tensors."""
    return hashlib.sha256(_NUMBERED.sub(rb"\1", plan)).hexdigest()


def _flag_note(
    library: Library, trt: Any, sparse_weights: bool, sparse_flag: SparseFlagEffect | None
) -> tuple[str, ...]:
    """What builds without the sparse flag showed; that says nothing about the kernels that a GPU runs."""
    if library.builds_on_gpu or not sparse_weights:
        return ()
    name = f"{library.name} {trt.__version__}"
    if sparse_flag == SAME_BYTES:
        return (f"{name} takes no sparse weights ahead of time: without the sparse flag the plan has the same bytes",)
    if sparse_flag == SAME_CONTENT:
        return (
            f"{name} takes no sparse weights ahead of time: without the sparse flag the plan differs only in the numbers of"
            " the compiler's own tensors",
        )
    if sparse_flag == OTHER_BYTES:
        return (f"{name} builds another plan with the sparse flag; whether sparse kernels run is not known",)
    return (f"two builds of {name} with the same options differ, so it is not known what the sparse flag changes",)


def _warnings(onnx_model: OnnxModel, sparse_weights: bool, options: TrtOptions) -> tuple[str, ...]:
    """Reasons why a plan that may use sparse kernels probably has none."""
    if not sparse_weights:
        return ()
    notes = []
    if onnx_model.precision == "fp32":
        notes.append(FP32_NOTE)
    if options.optimization_level < MIN_LEVEL_FOR_SPARSE:
        notes.append(
            f"optimization level {options.optimization_level}: below {MIN_LEVEL_FOR_SPARSE} the builder skips"
            " tactics, including sparse ones"
        )
    return tuple(notes)


def compile_plan(
    trt: Any,
    onnx_model: OnnxModel,
    profiles: tuple[Profile, ...],
    sparse_weights: bool,
    options: TrtOptions,
    log_capture: TrtLogCapture,
    implicit: ImplicitInt8 | None = None,
) -> bytes:
    """The bytes of a plan; `log_capture` has what the library logged.

    Raises:
        HostError: See `build_trt`.
        InputError: The library cannot parse or build the model.
    """
    builder = construct(trt.Builder, log_capture)
    network = builder.create_network(network_flags(trt) if implicit is None else 0)
    if network is None:
        raise _failed("failed to create a network", onnx_model, log_capture)
    parse(trt, network, onnx_model, log_capture)
    config = builder.create_builder_config()
    if config is None:
        raise _failed("failed to create a builder configuration", onnx_model, log_capture)
    _configure(trt, config, sparse_weights, options)
    for profile in profiles:
        _add_profile(builder, config, onnx_model, profile, log_capture)
    if options.timing_cache is not None:
        load_timing_cache(config, options.timing_cache, options.timing_cache_wait_s)
    calibration: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if implicit is not None:
        calibration = calibrating(trt, builder, config, onnx_model.inputs[0], implicit)
    with calibration, progress_monitor(trt) as monitor:
        config.progress_monitor = monitor
        memory = builder.build_serialized_network(network, config)
    if memory is None:
        raise _failed("cannot build the model", onnx_model, log_capture)
    if options.timing_cache is not None:
        save_timing_cache(config, options.timing_cache, options.timing_cache_wait_s)
    return bytes(memory)


def _configure(trt: Any, config: Any, sparse_weights: bool, options: TrtOptions) -> None:
    flags = {
        trt.BuilderFlag.SPARSE_WEIGHTS: sparse_weights,
        trt.BuilderFlag.TF32: options.tf32,
        trt.BuilderFlag.VERSION_COMPATIBLE: options.version_compatible,
        trt.BuilderFlag.REFIT: options.refittable,
        trt.BuilderFlag.STRIP_PLAN: options.strip_plan,
        # A stripped plan is refitted with the same weights; for other weights it must be refittable.
        trt.BuilderFlag.REFIT_IDENTICAL: options.strip_plan and not options.refittable,
    }
    for flag, on in flags.items():
        if on:
            config.set_flag(flag)
        else:
            config.clear_flag(flag)
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    set_targets(trt, config, options.targets)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)


def _add_profile(
    builder: Any, config: Any, onnx_model: OnnxModel, profile: Profile, log_capture: TrtLogCapture
) -> None:
    shape = builder.create_optimization_profile()
    for spec in onnx_model.inputs:
        try:
            shape.set_shape(spec.name, *shapes_of(onnx_model, spec, profile))
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"{log_capture.library.name} rejects a profile",
                where=f"{onnx_model.path}: {spec.name}",
                found=f"{profile}: {error}",
                fix="use batch sizes that the graph accepts, in ascending order",
            ) from error
    if config.add_optimization_profile(shape) < 0:
        raise InputError(
            f"{log_capture.library.name} rejects a profile",
            where=onnx_model.path,
            found=f"{profile}; {log_capture.reason()}",
            fix="use batch sizes that the graph accepts; a graph with a fixed batch accepts only that one",
        )


def _inspect(
    trt: Any, plan: bytes, options: TrtOptions
) -> tuple[tuple[LayerSparsity, ...], int | None, tuple[str, ...]]:
    """The plan's layers and the device memory of one context in bytes; if the inspection fails, a note with the reason."""
    log_capture = TrtLogCapture(trt)
    try:
        runtime = construct(trt.Runtime, log_capture)
        if options.version_compatible:
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise RuntimeError(log_capture.reason())
        inspector = engine.create_engine_inspector()
        if inspector is None:
            raise RuntimeError(log_capture.reason())
        layers = parse_layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    except (PipelineError, RuntimeError, TypeError, ValueError) as error:  # the last three come from the bindings
        why = f"{error.what}: {error.found}" if isinstance(error, PipelineError) else error
        return (
            (),
            None,
            (f"the plan cannot be inspected on this host, so it is unknown which layers run sparse: {why}",),
        )
    memory = member(engine, "device_memory_size_v2")
    return layers, None if memory is None else int(memory), ()


def _sparsity_notes(log_capture: TrtLogCapture) -> tuple[str, ...]:
    """What the builder logged about sparsity, as at most one note."""
    parsed = parse_sparsity_log(log_capture.sparsity)
    parts = [f"found {found} layers eligible, chose {chosen}" for found, chosen in parsed.counts]
    parts += [
        f"{label}: {', '.join(names)}"
        for label, names in (("eligible", parsed.eligible), ("chosen", parsed.chosen))
        if names
    ]
    if parsed.unread:
        parts.append(f"{parsed.unread} lines could not be parsed")
    return (f"TensorRT's log: {'; '.join(parts)}",) if parts else ()


def _failed(what: str, onnx_model: OnnxModel, log_capture: TrtLogCapture) -> PipelineError:
    if log_capture.is_out_of_memory():
        return HostError(
            "insufficient GPU memory for the build",
            where=onnx_model.path,
            found=log_capture.reason(),
            fix="free GPU memory, reduce the batch sizes with --profile, or change the workspace limit",
        )
    return BuildError(
        f"{log_capture.library.name} {what}",
        where=onnx_model.path,
        found=log_capture.reason(),
        fix="see all its messages with `maskplan -v`; `maskplan check` shows whether the weights conform",
    )
