"""The line's stages on engines: build, compare, time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from maskplan.engines.base import Classifier
from maskplan.engines.build import SUFFIX, BuildOptions, build_engine, is_foreign, open_engine, profiles_for
from maskplan.engines.ort import NO_SPARSE_KERNELS, OrtEngine
from maskplan.engines.sidecar import has_sidecar, write_sidecar
from maskplan.pipeline.core.artifacts import Checkpoint, EngineFile, OnnxModel
from maskplan.pipeline.core.choices import ONNXRUNTIME, TENSORRT
from maskplan.pipeline.core.files import read_bytes, write_atomically
from maskplan.pipeline.core.reports import Fidelity, ParityReport, TimingReport
from maskplan.pipeline.parity.compare import compare, fidelity
from maskplan.pipeline.stages.model import Images, Job, row_of
from maskplan.pipeline.timing.compare_latency import time_engines

# Images on which an engine is held against its own ONNX file, and noise on which random weights are compared.
_FIDELITY_IMAGES, _NOISE_IMAGES = 32, 32

# Stages that build the same sparse engine: as the line's own, and as one of two of which one will be kept.
_BUILD, _BUILD_CANDIDATE = "build-sparse", "build-candidate"


@dataclass(frozen=True)
class Engines:
    """The three of a fair comparison; `pruned` is `sparse` itself where the runtime has no sparse flag."""

    dense: EngineFile
    pruned: EngineFile
    sparse: EngineFile


@dataclass(frozen=True)
class Compared:
    """Both verdicts of the compare stage."""

    parity: ParityReport
    fidelity: Fidelity


def build(
    job: Job, backend: str, dense: OnnxModel | EngineFile, sparse: OnnxModel, *, candidate: bool = False
) -> Engines:
    """Build the engines of a fair comparison.

    Args:
        job: The run.
        backend: `tensorrt` or `onnxruntime`.
        dense: The dense model, or its engine from an earlier pass.
        sparse: The pruned model.
        candidate: Put the sparse engine aside; `keep_engine` gives it its name. One that a run without this option has
            built, or the other way round, is copied, for builds of one graph differ.
    """

    def engine(name: str, model: OnnxModel, out: Path, sparse_weights: bool, twin: str | None = None) -> EngineFile:
        options = BuildOptions(backend, sparse_weights=sparse_weights)
        if backend == TENSORRT:
            profiles = profiles_for(model, job.recipe.time.batches)
            options = replace(options, profiles=profiles, trt=job.recipe.tensorrt)
        # Where measurements are kept is a matter of the host.
        inputs = {"onnx": model.sha256, "options": replace(options, trt=replace(options.trt, timing_cache=None))}

        def work() -> EngineFile:
            built = job.ws.known(twin, EngineFile, inputs) if twin is not None else None
            if built is None or is_foreign(built):
                return build_engine(model, options, out)
            return _copied_engine(built, out)

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
    if backend == ONNXRUNTIME:
        return Engines(dense_engine, sparse_engine, sparse_engine)
    pruned = engine("build-pruned", sparse, job.ws.hidden(f"pruned_engine{suffix}"), False)
    return Engines(dense_engine, pruned, sparse_engine)


def keep_engine(job: Job, engine: EngineFile) -> EngineFile:
    """Copy the better of two candidates to where an engine is looked for."""
    out = job.ws.path(f"engine{engine.path.suffix}")
    inputs = {"engine": _identity(engine)}
    return job.ws.stage("keep-engine", EngineFile, inputs, lambda: _copied_engine(engine, out), intact=has_sidecar)


def _copied_engine(engine: EngineFile, out: Path) -> EngineFile:
    copied = replace(engine, path=out, sha256=write_atomically(out, read_bytes(engine.path)))
    write_sidecar(copied)
    return copied


def judge(
    job: Job,
    engines: Engines,
    own_onnx: OnnxModel,
    others: Mapping[str, OnnxModel],
    sparse: Checkpoint,
    images: Images | None,
    untouched: OnnxModel | None = None,
) -> Compared:
    """Compare the sparse engine with the dense model, with others, and with its own ONNX file.

    The dense model is the dense engine or, where that is quantized as well, `untouched`.
    """
    made = sparse.provenance
    # Labeled images say nothing about random weights.
    val = images.data.val if images is not None and made.trained else None
    options = job.recipe.compare
    if val is None:
        options = replace(options, fixed_images=min(options.fixed_images, _NOISE_IMAGES))

    def work() -> Compared:
        with contextlib.ExitStack() as stack:
            sparse_model = stack.enter_context(opened(engines.sparse))
            dense = opened(engines.dense) if untouched is None else Classifier(OrtEngine(untouched.path), "dense")
            dense_model = stack.enter_context(dense)
            models = {name: stack.enter_context(Classifier(OrtEngine(m.path), name)) for name, m in others.items()}
            parity = compare(
                dense_model,
                sparse_model,
                made.preprocessing,
                [engines.dense.provenance, made],
                val,
                options,
                models,
                sparse_name=row_of(made, own_onnx.precision),
            )
            reference = stack.enter_context(Classifier(OrtEngine(own_onnx.path, optimized=False), "its ONNX file"))
            count = min(options.fixed_images, _FIDELITY_IMAGES)
            return Compared(parity, fidelity(sparse_model, reference, made.preprocessing, val, count))

    inputs = {
        "engines": [_identity(e) for e in (engines.dense, engines.sparse)],
        "others": {name: m.sha256 for name, m in others.items()},
        **({"untouched": untouched.sha256} if untouched is not None else {}),
        "val": images.sets.val.sha256 if images and val else None,
        "options": options,
    }
    return job.ws.stage("compare", Compared, inputs, work)


def time_stage(job: Job, engines: Engines) -> TimingReport:
    """Time the engines in turn."""
    on_cpu = engines.sparse.backend == ONNXRUNTIME

    def work() -> TimingReport:
        with opened(engines.dense) as dense, opened(engines.sparse) as sparse, opened(engines.pruned) as pruned:
            return time_engines(
                dense,
                sparse,
                pruned,
                job.recipe.time,
                note=NO_SPARSE_KERNELS if on_cpu else "",
                same_file=on_cpu,
                device=None if on_cpu else engines.sparse.device,
            )

    identities = [_identity(e) for e in (engines.dense, engines.pruned, engines.sparse)]
    return job.ws.stage("time", TimingReport, {"engines": identities, "options": job.recipe.time}, work)


def _identity(engine: EngineFile) -> str | list[str | None]:
    """What tells an engine's results from another's: of a plan, the GPU and the TensorRT too."""
    if engine.backend == ONNXRUNTIME:
        return engine.sha256
    return [engine.sha256, engine.runtime_version, engine.device, engine.compute_capability]


@contextlib.contextmanager
def opened(engine: EngineFile) -> Iterator[Classifier]:
    """An engine opened for images, and closed again."""
    profiles = engine.profiles if engine.backend == TENSORRT else ()
    with Classifier(open_engine(engine), engine.path.name, profiles) as model:
        yield model
