"""The stages on engines: build, compare, time."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
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
from maskplan.engines.ort import NO_SPARSE_KERNELS, PLANS_DID_NOT_RUN, OrtEngine
from maskplan.engines.sidecar import has_sidecar, write_sidecar
from maskplan.pipeline.core.artifacts import EngineFile, ImageSet, OnnxModel, Profile
from maskplan.pipeline.core.choices import GPU_BACKENDS, ONNXRUNTIME, SAME_BYTES, SAME_CONTENT, Backend, FloatPrecision
from maskplan.pipeline.core.files import read_bytes, write_atomically
from maskplan.pipeline.core.reports import Fidelity, ParityReport, TimingReport
from maskplan.pipeline.data.samples import Samples
from maskplan.pipeline.parity.compare import compare as compare_models
from maskplan.pipeline.parity.compare import fidelity
from maskplan.pipeline.parity.held_out import held_out_note
from maskplan.pipeline.stages.job import Images, Job, Network
from maskplan.pipeline.stages.onnx_files import row_name
from maskplan.pipeline.timing.compare_latency import time_engines

log = logging.getLogger(__name__)

# Images for comparing an engine with its own ONNX file, and noise images for comparing random weights.
_FIDELITY_IMAGES, _NOISE_IMAGES = 32, 32

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


@dataclass(frozen=True)
class Compared:
    """Both verdicts of the compare stage; the second is None where the engine's plan did not run."""

    parity: ParityReport
    fidelity: Fidelity | None


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


def compare(
    job: Job,
    engines: Engines,
    float_precision: FloatPrecision,
    dense: Network,
    sparse: Network,
    rows: Mapping[str, OnnxModel],
    images: Images | None,
) -> Compared:
    """Compare the sparse engine with the dense model, with other methods, and with its own ONNX file.

    The gate compares with the untouched dense model: its engine, or its FP32 file where the dense engine is INT8 as well.

    Args:
        job: The run.
        engines: The engines of `dense` and `sparse`.
        float_precision: What the engines run in where they are not INT8.
        dense: The untouched network.
        sparse: The pruned network.
        rows: More rows of the table of accuracies, by name.
        images: Labeled images; without them the engines are compared on noise.
    """
    provenance, own_onnx = sparse.checkpoint.provenance, sparse.deployed.of(float_precision)
    untouched = None if dense.int8 is None else dense.floats.fp32
    # Labeled images say nothing about random weights.
    val = images.data.val if images is not None and provenance.trained else None
    options = job.recipe.compare
    if val is None:
        options = replace(options, fixed_images=min(options.fixed_images, _NOISE_IMAGES))

    def work() -> Compared:
        with contextlib.ExitStack() as stack:
            sparse_model = stack.enter_context(open_classifier(engines.sparse))
            dense_model = stack.enter_context(_reference(engines, dense))
            models = {name: stack.enter_context(_onnx_classifier(model, name)) for name, model in rows.items()}
            parity = compare_models(
                dense_model,
                sparse_model,
                provenance.preprocessing,
                [engines.dense.provenance, provenance],
                val,
                options,
                models,
                sparse_name=row_name(provenance, own_onnx.precision),
            )
            if val is not None and images is not None and parity.top1_dense is not None:
                note = held_out_note(dense_model, provenance.preprocessing, images.data, parity.top1_dense)
                if note is not None:
                    log.warning("%s", note)
                    parity = replace(parity, notes=(*parity.notes, note))
            if engines.stands_in_for is not None:
                return Compared(replace(parity, notes=(*parity.notes, PLANS_DID_NOT_RUN)), None)
            # Graph optimizations round differently; the reference runs the nodes as they are in the file.
            exact = stack.enter_context(_onnx_classifier(own_onnx, "its ONNX file", optimized=False))
            count = min(options.fixed_images, _FIDELITY_IMAGES)
            return Compared(parity, fidelity(sparse_model, exact, provenance.preprocessing, val, count))

    inputs = {
        "engines": [engine_identity(e) for e in (engines.dense, engines.sparse)],
        "others": {name: m.sha256 for name, m in rows.items()},
        **({"untouched": untouched.sha256} if untouched is not None else {}),
        **_stand_in_key(engines),
        "val": images.sets.val.key if images and val else None,
        # Whether `select` is held out is read off samples of these parts.
        "shaping": [s.key for s in images.sets.shaping] if images and val else None,
        "options": options,
    }
    return job.ws.stage("compare", Compared, inputs, work)


def compare_on_select(
    job: Job, engines: Engines, dense: Network, sparse: Network, images: Images | None
) -> ParityReport:
    """Compare the sparse engine with the dense model on `select`, to choose between two engines without reading `val`."""
    provenance = sparse.checkpoint.provenance
    select = images.data.select if images is not None and provenance.trained else None
    options = replace(job.recipe.compare, fixed_images=min(job.recipe.compare.fixed_images, _NOISE_IMAGES))

    def work() -> ParityReport:
        with _reference(engines, dense) as dense_model, open_classifier(engines.sparse) as sparse_model:
            provenances = [engines.dense.provenance, provenance]
            return compare_models(dense_model, sparse_model, provenance.preprocessing, provenances, select, options)

    inputs = {
        "engines": [engine_identity(e) for e in (engines.dense, engines.sparse)],
        "dense": dense.floats.fp32.sha256,
        "select": images.sets.select.key if images and select else None,
        "options": options,
    }
    return job.ws.stage("compare-select", ParityReport, inputs, work)


def _reference(engines: Engines, dense: Network) -> contextlib.AbstractContextManager[Classifier]:
    """The untouched dense model: its engine, or its FP32 file where the dense engine is INT8 as well."""
    if dense.int8 is None:
        return open_classifier(engines.dense)
    return _onnx_classifier(dense.floats.fp32, "dense")


def _onnx_classifier(model: OnnxModel, name: str, *, optimized: bool = True) -> Classifier:
    return Classifier(OrtEngine(model.path, optimized=optimized), name)


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
    inputs = {"engines": identities, "options": job.recipe.time, **_stand_in_key(engines)}
    if identity is not None:
        inputs["samples"] = identity.sha256
    return job.ws.stage("time", TimingReport, inputs, work)


def _stand_in_key(engines: Engines) -> dict[str, str]:
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
