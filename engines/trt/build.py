"""ONNX to a TensorRT plan: a strongly typed network, with the sparse-weights flag."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from engines.evidence import layers_of, with_reasons
from engines.trt.cuda import gpu
from engines.trt.log import Heard
from engines.trt.options import LEAST_LEVEL_FOR_SPARSE, TrtOptions
from engines.trt.progress import progress_monitor
from engines.trt.timing_cache import load_timing_cache, save_timing_cache
from engines.trt.versions import import_tensorrt, member, network_flags
from exporters.conformance import conforming_nodes
from pipeline.artifacts import EngineFile, LayerSparsity, OnnxModel, Profile, TensorSpec
from pipeline.errors import HostError, InputError, PipelineError, listed
from pipeline.files import write_atomically

log = logging.getLogger(__name__)

FP32_NOTE = "an FP32 graph: TensorRT documents sparse kernels for FP16 and INT8 only"


def build_trt(
    onnx_model: OnnxModel, profiles: tuple[Profile, ...], sparse_weights: bool, options: TrtOptions, out: Path
) -> EngineFile:
    """Build a plan with one optimisation profile for each of `profiles`.

    Raises:
        HostError: TensorRT or a GPU is missing, its memory does not suffice, or the timing cache is busy.
        InputError: TensorRT cannot parse or build the model; its own messages are quoted.
    """
    trt = import_tensorrt()
    device = gpu()
    heard = Heard(trt)
    started = time.perf_counter()
    builder = _builder(trt, heard)
    network = builder.create_network(network_flags(trt))
    if network is None:
        raise _failed("TensorRT makes no network", onnx_model, heard)
    _parse(trt, network, onnx_model, heard)
    config = builder.create_builder_config()
    notes = _configure(trt, config, onnx_model, sparse_weights, options)
    for profile in profiles:
        _add_profile(builder, config, onnx_model, profile, heard)
    if options.timing_cache is not None:
        load_timing_cache(config, options.timing_cache, options.timing_cache_wait_s)
    with progress_monitor(trt) as monitor:
        config.progress_monitor = monitor
        memory = builder.build_serialized_network(network, config)
    if memory is None:
        raise _failed("TensorRT cannot build the model", onnx_model, heard)
    plan = bytes(memory)
    if options.timing_cache is not None:
        save_timing_cache(config, options.timing_cache, options.timing_cache_wait_s)
    build_s = round(time.perf_counter() - started, 3)
    found, device_memory_bytes = _inspect(trt, plan, heard)
    layers = with_reasons(
        found,
        conforming=conforming_nodes(onnx_model.path),
        precision=onnx_model.precision,
        optimization_level=options.optimization_level,
    )
    for note in notes:
        log.warning("%s", note)
    return EngineFile(
        path=out,
        sha256=write_atomically(out, plan),
        bytes=len(plan),
        backend="tensorrt",
        precision=onnx_model.precision,
        runtime_version=str(trt.__version__),
        device=device.name,
        compute_capability=device.compute_capability,
        device_memory_bytes=device_memory_bytes,
        sparse_weights=sparse_weights,
        typing="strong",
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        profiles=profiles,
        inputs=onnx_model.inputs,
        outputs=onnx_model.outputs,
        onnx_sha256=onnx_model.sha256,
        build_s=build_s,
        provenance=onnx_model.provenance,
        layers=layers,
        notes=notes,
    )


def _builder(trt: Any, heard: Heard) -> Any:
    try:
        return trt.Builder(heard.logger)
    except (TypeError, RuntimeError) as error:
        # What the bindings make of a constructor that returned nothing, as without a driver.
        raise HostError(
            "TensorRT has no builder here",
            found=heard.why() if heard.errors else str(error),
            fix="check that nvidia-smi sees a GPU and that the driver is recent enough for this TensorRT",
        ) from error


def _parse(trt: Any, network: Any, onnx_model: OnnxModel, heard: Heard) -> None:
    parser = trt.OnnxParser(network, heard.logger)
    if parser.parse_from_file(str(onnx_model.path)):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    raise InputError(
        f"TensorRT cannot parse the model: {len(errors)} errors",
        where=onnx_model.path,
        found=listed(f"node {e.node_name() or e.node()} ({e.node_operator() or '?'}): {e.desc()}" for e in errors)
        or heard.why(),
        fix="export with another opset, or leave these operators out of the graph",
    )


def _configure(
    trt: Any, config: Any, onnx_model: OnnxModel, sparse_weights: bool, options: TrtOptions
) -> tuple[str, ...]:
    """Set flags and limits; what a user should know of them is returned."""
    flags = trt.BuilderFlag
    wanted = {
        flags.SPARSE_WEIGHTS: sparse_weights,
        flags.TF32: options.tf32,
        flags.VERSION_COMPATIBLE: options.version_compatible,
        flags.REFIT: options.refittable or options.stripped,
        flags.STRIP_PLAN: options.stripped,
    }
    for flag, on in wanted.items():
        if on:
            config.set_flag(flag)
        else:
            config.clear_flag(flag)
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    notes = []
    if sparse_weights and onnx_model.precision == "fp32":
        notes.append(FP32_NOTE)
    if sparse_weights and options.optimization_level < LEAST_LEVEL_FOR_SPARSE:
        notes.append(
            f"optimisation level {options.optimization_level}: below {LEAST_LEVEL_FOR_SPARSE} the builder leaves out"
            " tactics, sparse ones among them"
        )
    return tuple(notes)


def _add_profile(builder: Any, config: Any, onnx_model: OnnxModel, profile: Profile, heard: Heard) -> None:
    shape = builder.create_optimization_profile()
    for spec in onnx_model.inputs:
        shapes = [_with_batch(spec, batch) for batch in (profile.min, profile.opt, profile.max)]
        try:
            shape.set_shape(spec.name, *shapes)
        except ValueError as error:
            raise InputError("TensorRT refuses a profile", where=spec.name, found=f"{profile}: {error}") from error
    if config.add_optimization_profile(shape) < 0:
        raise InputError(
            "TensorRT refuses a profile",
            where=onnx_model.path,
            found=f"{profile}; {heard.why()}",
            fix="give batch sizes that the graph accepts; one of a fixed batch takes no other",
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


def _inspect(trt: Any, plan: bytes, heard: Heard) -> tuple[tuple[LayerSparsity, ...], int | None]:
    """What the plan says of its layers, and the device memory that one context takes."""
    engine = trt.Runtime(heard.logger).deserialize_cuda_engine(plan)
    if engine is None:
        # A stripped plan has no weights to run with, but it may still be inspected after refitting elsewhere.
        log.warning("the plan cannot be inspected here: %s", heard.why())
        return (), None
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    memory = member(engine, "device_memory_size_v2")
    return layers_of(text), None if memory is None else int(memory)


def _failed(what: str, onnx_model: OnnxModel, heard: Heard) -> PipelineError:
    if heard.is_out_of_memory():
        return HostError(
            "the GPU's memory does not suffice for the build",
            where=onnx_model.path,
            found=heard.why(),
            fix="free the GPU, give smaller batches with --profile, or limit --workspace-bytes",
        )
    return InputError(
        what,
        where=onnx_model.path,
        found=heard.why(),
        fix="see TensorRT's messages above; `maskplan check` shows whether the weights conform",
    )
