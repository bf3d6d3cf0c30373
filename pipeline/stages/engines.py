"""The stages on engines: build and time."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from maskplan.engines.base import Classifier
from maskplan.engines.batch_runner import BatchRunner
from maskplan.engines.build import (
    SUFFIX,
    BuildOptions,
    build_engine,
    device_of,
    is_foreign,
    open_engine,
    profiles_for,
    why_not_runnable,
)
from maskplan.engines.ort import NO_SPARSE_KERNELS, PLANS_DID_NOT_RUN
from maskplan.engines.sidecar import has_sidecar, write_sidecar
from maskplan.pipeline.core.artifacts import EngineFile, ImageSet, OnnxModel, Profile
from maskplan.pipeline.core.choices import GPU_BACKENDS, ONNXRUNTIME, SAME_BYTES, SAME_CONTENT, Backend
from maskplan.pipeline.core.files import read_bytes, write_atomically
from maskplan.pipeline.core.reports import TimingReport
from maskplan.pipeline.data.samples import Samples
from maskplan.pipeline.stages.job import Job
from maskplan.pipeline.timing.compare_latency import time_engines

log = logging.getLogger(__name__)

# Two stages build the same sparse engine: as the result of the line, and as one of two candidates of `--refine`.
_BUILD, _BUILD_CANDIDATE = "build-sparse", "build-candidate"


@dataclass(frozen=True)
class Engines:
    """The three engines of a fair comparison.

    Attributes:
        dense: Dense weights.
        pruned: The sparse engine's weights without the sparse flag; `sparse` itself where the flag makes no difference.
        sparse: Pruned weights.
        stands_in_for: The backend whose plans do not run on this host, where these engines run in their place.
    """

    dense: EngineFile
    pruned: EngineFile
    sparse: EngineFile
    stands_in_for: Backend | None = None


def build(
    job: Job,
    backend: Backend,
    dense: OnnxModel | EngineFile,
    sparse: OnnxModel,
    *,
    candidate: bool = False,
    profiles: tuple[Profile, ...] | None = None,
) -> Engines:
    """Build the engines of a fair comparison.

    Args:
        job: The run.
        backend: What to build for.
        dense: The dense model, or its engine from an earlier pass.
        sparse: The pruned model.
        candidate: Write the sparse engine between stages; `keep_engine` copies the better candidate to its final name. An
            engine of the same inputs that a run without this option has built is copied, for builds of one graph differ.
        profiles: Of engines for a GPU; by default one for each batch size that is timed.
    """

    def engine(name: str, model: OnnxModel, out: Path, sparse_weights: bool, twin: str | None = None) -> EngineFile:
        options = BuildOptions(backend, sparse_weights=sparse_weights)
        if backend in GPU_BACKENDS:
            own = profiles_for(model, job.recipe.time.batches) if profiles is None else profiles
            options = replace(options, profiles=own, trt=job.recipe.tensorrt)
        # The path of the timing cache belongs to the host, not to the engine.
        inputs = {"onnx": model.sha256, "options": replace(options, trt=replace(options.trt, timing_cache=None))}

        def work() -> EngineFile:
            built = job.ws.known(twin, EngineFile, inputs) if twin is not None else None
            if built is None or is_foreign(built):
                return build_engine(model, options, out)
            return _copy_engine(built, out)

        return job.ws.stage(name, EngineFile, inputs, work, intact=lambda e: has_sidecar(e) and not is_foreign(e))

    suffix = SUFFIX[backend]
    if candidate:
        sparse_engine = engine(_BUILD_CANDIDATE, sparse, job.ws.hidden(f"candidate{suffix}"), True, twin=_BUILD)
    else:
        sparse_engine = engine(_BUILD, sparse, job.ws.path(f"engine{suffix}"), True, twin=_BUILD_CANDIDATE)
    if isinstance(dense, EngineFile):
        dense_engine = dense
    else:
        dense_engine = engine("build-dense", dense, job.ws.path(f"dense_engine{suffix}"), False)
    if backend not in GPU_BACKENDS or sparse_engine.sparse_flag in (SAME_BYTES, SAME_CONTENT):
        return Engines(dense_engine, sparse_engine, sparse_engine)
    pruned = engine("build-pruned", sparse, job.ws.hidden(f"pruned_engine{suffix}"), False)
    return Engines(dense_engine, pruned, sparse_engine)


def runnable(job: Job, built: Engines, dense: OnnxModel, sparse: OnnxModel) -> Engines:
    """The engines that are compared and timed: the built ones, or ONNX Runtime's for plans that do not run on this host.

    Args:
        job: The run.
        built: The engines.
        dense: The ONNX file of the dense engine.
        sparse: The ONNX file of the sparse engine.
    """
    reason = why_not_runnable(built.sparse)
    if reason is None:
        return built
    log.warning("%s (%s)", PLANS_DID_NOT_RUN, reason)

    def engine(name: str, model: OnnxModel) -> EngineFile:
        out, options = job.ws.hidden(f"{name}.onnx"), BuildOptions(ONNXRUNTIME, sparse_weights=False)
        stage = f"build-{name}-onnxruntime"
        return job.ws.stage(
            stage, EngineFile, {"onnx": model.sha256}, lambda: build_engine(model, options, out), intact=has_sidecar
        )

    dense_engine, sparse_engine = engine("dense", dense), engine("sparse", sparse)
    return Engines(dense_engine, sparse_engine, sparse_engine, stands_in_for=built.sparse.backend)


def keep_engine(job: Job, engine: EngineFile) -> EngineFile:
    """Copy the better of two candidates to its final name."""
    out = job.ws.path(f"engine{SUFFIX[engine.backend]}")
    inputs = {"engine": engine_identity(engine)}
    return job.ws.stage("keep-engine", EngineFile, inputs, lambda: _copy_engine(engine, out), intact=has_sidecar)


def _copy_engine(engine: EngineFile, out: Path) -> EngineFile:
    copied = replace(engine, path=out, sha256=write_atomically(out, read_bytes(engine.path)))
    write_sidecar(copied)
    return copied


def time_stage(
    job: Job, engines: Engines, samples: Samples | None = None, identity: ImageSet | None = None
) -> TimingReport:
    """Time the engines interleaved, on samples of the network's own, of this `identity`, where noise does not do."""
    on_cpu = engines.sparse.backend not in GPU_BACKENDS
    notes = [PLANS_DID_NOT_RUN] if engines.stands_in_for is not None else []
    notes += [NO_SPARSE_KERNELS] if on_cpu else []

    def work() -> TimingReport:
        with (
            open_runner(engines.dense) as dense,
            open_runner(engines.sparse) as sparse,
            open_runner(engines.pruned) as pruned,
        ):
            return time_engines(
                dense,
                sparse,
                pruned,
                job.recipe.time,
                note="; ".join(notes),
                same_file=engines.pruned == engines.sparse,
                device=None if on_cpu else device_of(engines.sparse),
                samples=samples,
            )

    identities = [engine_identity(e) for e in (engines.dense, engines.pruned, engines.sparse)]
    inputs = {"engines": identities, "options": job.recipe.time, **stand_in_key(engines)}
    if identity is not None:
        inputs["samples"] = identity.sha256
    return job.ws.stage("time", TimingReport, inputs, work)


def stand_in_key(engines: Engines) -> dict[str, str]:
    """For the key of every stage that runs the engines."""
    return {} if engines.stands_in_for is None else {"stands_in_for": engines.stands_in_for}


def engine_identity(engine: EngineFile) -> str | list[str | None]:
    """What identifies an engine's results: for a plan, the GPU and the TensorRT version too."""
    if engine.backend not in GPU_BACKENDS:
        return engine.sha256
    return [engine.sha256, engine.runtime_version, device_of(engine), engine.compute_capability]


@contextlib.contextmanager
def open_runner(engine: EngineFile) -> Iterator[BatchRunner]:
    """Open an engine for samples of any kind, and close it."""
    profiles = engine.profiles if engine.backend in GPU_BACKENDS else ()
    with BatchRunner(open_engine(engine), engine.path.name, profiles) as runner:
        yield runner


@contextlib.contextmanager
def open_classifier(engine: EngineFile) -> Iterator[Classifier]:
    """Open an engine for images, and close it."""
    profiles = engine.profiles if engine.backend in GPU_BACKENDS else ()
    with Classifier(open_engine(engine), engine.path.name, profiles) as model:
        yield model
