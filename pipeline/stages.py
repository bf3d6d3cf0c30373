"""Each stage with the digests and options that decide whether it has to run again. The order is `run.py`'s."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from engines.base import Classifier
from engines.build import (
    ONNXRUNTIME,
    SUFFIX,
    TENSORRT,
    BuildOptions,
    build_engine,
    is_foreign,
    open_engine,
    profiles_for,
)
from engines.ort import NO_SPARSE_KERNELS, OrtEngine
from engines.sidecar import has_sidecar, write_sidecar
from engines.trt.options import TrtOptions
from exporters.conformance import CheckOptions, check_2to4
from exporters.onnx_export import export_onnx
from pipeline.artifacts import Checkpoint, EngineFile, ImageSet, MaskSet, OnnxModel, Provenance
from pipeline.bake import bake
from pipeline.checkpoint import ModelOptions, load_checkpoint, module_of, weights_file
from pipeline.compare import compare, fidelity
from pipeline.data import Dataset, ImageFiles, identify, listing_sha256, require_disjoint
from pipeline.files import read_bytes, sha256_of, write_atomically
from pipeline.learning.recipes import LearnFiles
from pipeline.mask import LEARNED, MAGNITUDE, choose_masks, given_masks
from pipeline.masking.maskset import leave_out
from pipeline.models import model_identity
from pipeline.recalibrate import recalibrate
from pipeline.recipe import Recipe
from pipeline.records import encode
from pipeline.refine import RAN_DENSE
from pipeline.report import ReportFiles, RunReport, write_report
from pipeline.reports import ConformanceReport, Fidelity, ParityReport, TimingReport
from pipeline.timing import time_engines
from pipeline.workspace import Workspace

_STATE, _LOG = "learning.safetensors", "learning"
# Stages that build the same sparse engine: as the line's own, and as one of two of which one will be kept.
_BUILD, _BUILD_CANDIDATE = "build-sparse", "build-candidate"


@dataclass(frozen=True)
class ImageSets:
    """What the data holds, by digest."""

    train: ImageSet
    select: ImageSet
    val: ImageSet

    @property
    def shaping(self) -> tuple[ImageSet, ...]:
        return (self.train, self.select)


@dataclass(frozen=True)
class Images:
    """The data and what it holds."""

    data: Dataset
    sets: ImageSets


@dataclass(frozen=True)
class Job:
    """What every stage of one run has at hand."""

    ws: Workspace
    model: ModelOptions
    recipe: Recipe
    device: str = "auto"


@dataclass(frozen=True)
class Exported:
    """One model in both precisions."""

    fp32: OnnxModel
    fp16: OnnxModel

    def of(self, precision: str) -> OnnxModel:
        return {"fp32": self.fp32, "fp16": self.fp16}[precision]


@dataclass(frozen=True)
class Checked:
    """The verdicts on one model in both precisions."""

    fp32: ConformanceReport
    fp16: ConformanceReport

    def of(self, precision: str) -> ConformanceReport:
        return {"fp32": self.fp32, "fp16": self.fp16}[precision]


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


class ConformanceError(Exception):
    """The line made a file that does not conform: a gate that failed, not bad input."""


def load(job: Job) -> Checkpoint:
    """The dense checkpoint. Weights that a library fetches are known by their name, those of a file by its digest."""
    model = job.model
    file = weights_file(model)
    return job.ws.stage(
        "load",
        Checkpoint,
        {
            "model": model_identity(model.model),
            "weights": sha256_of(file) if file is not None else model.weights,
            "classes": model.classes,
            # Weights that were trained leave nothing to chance.
            "seed": model.seed if file is None and model.weights != "pretrained" else None,
        },
        lambda: load_checkpoint(model, job.ws.path("dense.safetensors")),
    )


def look_at_images(job: Job, data: Dataset, dense: Checkpoint) -> Images:
    """Digests of the images, each of which is read and decoded once; a folder that has not changed is not read again."""
    listing = [listing_sha256(s.images) for s in (data.train, data.val) if isinstance(s.images, ImageFiles)]
    sets = job.ws.stage(
        "images",
        ImageSets,
        {"listing": listing or "bundled", "classes": data.classes, "seed": job.model.seed},
        lambda: ImageSets(identify(data.train), identify(data.select), identify(data.val)),
    )
    require_disjoint(sets.val, (*sets.shaping, *dense.provenance.image_sets))
    return Images(data, sets)


def export(job: Job, checkpoint: Checkpoint, name: str) -> Exported:
    """`NAME.onnx` and `NAME.fp16.onnx`."""
    paths = {"fp32": job.ws.path(f"{name}.onnx"), "fp16": job.ws.path(f"{name}.fp16.onnx")}
    return job.ws.stage(
        f"export-{name}",
        Exported,
        {"checkpoint": checkpoint.sha256, "options": job.recipe.export},
        lambda: Exported(
            *export_onnx(module_of(job.model, checkpoint), checkpoint.provenance, job.recipe.export, paths)
        ),
    )


def choose(job: Job, dense: Checkpoint, how: str | Path, images: Images | None) -> MaskSet:
    """Masks by a method, or those of a file."""
    out = job.ws.path("masks.safetensors")
    if isinstance(how, Path):
        return job.ws.stage(
            "mask",
            MaskSet,
            {"checkpoint": dense.sha256, "file": sha256_of(how)},
            lambda: _copied(given_masks(module_of(job.model, dense), dense.provenance, how), out),
        )
    options = replace(job.recipe.mask, method=how)
    looks = how == LEARNED or options.keep_dense_budget > 0
    data, sets = (images.data, images.sets.shaping) if images and looks else (None, ())
    files = LearnFiles(job.ws.hidden(_STATE), log=job.ws.hidden(_LOG))
    return job.ws.stage(
        "mask",
        MaskSet,
        {"checkpoint": dense.sha256, "options": options, "images": [s.sha256 for s in sets]},
        lambda: choose_masks(
            module_of(job.model, dense),
            dense.provenance,
            options,
            out,
            data,
            sets,
            files=files,
            device=job.device,
        ),
    )


def restore(job: Job, masks: MaskSet, names: tuple[str, ...]) -> MaskSet:
    """The masks without some that pay for nothing, in a file of their own."""
    out = job.ws.path("masks.safetensors")
    inputs = {"masks": masks.sha256, "restored": names}
    return job.ws.stage("mask", MaskSet, inputs, lambda: leave_out(masks, names, RAN_DENSE, out))


def _copied(masks: MaskSet, out: Path) -> MaskSet:
    return replace(masks, path=out, sha256=write_atomically(out, read_bytes(masks.path)))


def prune(job: Job, dense: Checkpoint, masks: MaskSet, name: str, out: Path, images: Images | None) -> Checkpoint:
    """Bake the masks into the weights and, with images, recalibrate."""
    recipe = job.recipe.recalibrate
    recalibrating = images is not None and recipe.images > 0
    baked = job.ws.stage(
        f"bake-{name}",
        Checkpoint,
        {"checkpoint": dense.sha256, "masks": masks.sha256},
        lambda: bake(
            module_of(job.model, dense),
            dense.provenance,
            masks,
            job.ws.hidden(f"{name}-baked.safetensors") if recalibrating else out,
        ),
    )
    if images is None or not recalibrating:
        return baked
    train, shaped = images.data.train, (images.sets.train,)
    return job.ws.stage(
        f"recalibrate-{name}",
        Checkpoint,
        {"checkpoint": baked.sha256, "images": images.sets.train.sha256, "options": recipe},
        lambda: recalibrate(module_of(job.model, baked), baked.provenance, train, recipe, out, shaped),
    )


def check(job: Job, exported: Exported, pattern: str) -> Checked:
    """Check both precisions, so that the engine can be built from either elsewhere.

    Raises:
        ConformanceError: One of them is not N:M.
    """

    def one(model: OnnxModel) -> ConformanceReport:
        report = check_2to4(model.path, CheckOptions(pattern=pattern))
        if not report.passed:
            raise ConformanceError(f"{model.path.name} is not {pattern}: {report.reason}")
        return report

    inputs = {"onnx": [exported.fp32.sha256, exported.fp16.sha256], "pattern": pattern}
    return job.ws.stage("check", Checked, inputs, lambda: Checked(one(exported.fp32), one(exported.fp16)))


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
        profiles = profiles_for(model, job.recipe.time.batches)
        trt = job.recipe.tensorrt if backend == TENSORRT else TrtOptions()
        options = BuildOptions(backend, profiles, sparse_weights, trt)
        # Where measurements are kept is a matter of the host.
        inputs = {"onnx": model.sha256, "options": replace(options, trt=replace(trt, timing_cache=None))}

        def work() -> EngineFile:
            built = job.ws.known(twin, EngineFile, inputs) if twin is not None else None
            usable = built is not None and not is_foreign(built)
            return _copied_engine(built, out) if built is not None and usable else build_engine(model, options, out)

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


def baselines(job: Job, dense: Checkpoint, masks: MaskSet, images: Images | None) -> dict[str, OnnxModel]:
    """Magnitude masks on the same layers, without and with recalibration, to stand beside the chosen ones."""
    if images is None or not dense.provenance.trained:
        return {}
    names = [m.name for m in masks.masked]
    options = replace(job.recipe.mask, method=MAGNITUDE, pattern=str(masks.pattern), layout=masks.layout)
    out = job.ws.hidden("magnitude-masks.safetensors")
    magnitude = job.ws.stage(
        "baseline-mask",
        MaskSet,
        {"checkpoint": dense.sha256, "options": options, "layers": names},
        lambda: choose_masks(module_of(job.model, dense), dense.provenance, options, out, only=names),
    )
    found: dict[str, OnnxModel] = {}
    for name, used in (("magnitude", None), ("magnitude-recalibrated", images)):
        if used is not None and masks.method == MAGNITUDE:
            continue
        checkpoint = prune(job, dense, magnitude, name, job.ws.hidden(f"{name}.safetensors"), used)
        row = _row(checkpoint.provenance)
        # Without BatchNorm there is nothing to recalibrate, and one row is enough.
        if row not in found:
            found[row] = _export_baseline(job, checkpoint, name)
    return found


def _row(made: Provenance) -> str:
    """What the table of methods calls a pruned model."""
    return str(made.method) + (", recalibrated" if made.recalibrated_images else "")


def _export_baseline(job: Job, checkpoint: Checkpoint, name: str) -> OnnxModel:
    paths = {"fp32": job.ws.hidden(f"{name}.onnx")}
    return job.ws.stage(
        f"export-{name}",
        OnnxModel,
        {"checkpoint": checkpoint.sha256, "options": job.recipe.export},
        lambda: export_onnx(module_of(job.model, checkpoint), checkpoint.provenance, job.recipe.export, paths)[0],
    )


def judge(
    job: Job,
    engines: Engines,
    own_onnx: OnnxModel,
    others: Mapping[str, OnnxModel],
    sparse: Checkpoint,
    images: Images | None,
) -> Compared:
    """Compare the sparse engine with the dense one, with the baselines, and with its own ONNX file."""
    made = sparse.provenance
    # Labelled images say nothing about random weights.
    val = images.data.val if images is not None and made.trained else None
    options = job.recipe.compare

    def work() -> Compared:
        with contextlib.ExitStack() as stack:
            dense_model, sparse_model = (stack.enter_context(opened(e)) for e in (engines.dense, engines.sparse))
            models = {name: stack.enter_context(Classifier(OrtEngine(m.path), name)) for name, m in others.items()}
            parity = compare(
                dense_model,
                sparse_model,
                made.preprocessing,
                [engines.dense.provenance, made],
                val,
                options,
                models,
                sparse_name=_row(made),
            )
            reference = stack.enter_context(Classifier(OrtEngine(own_onnx.path, optimised=False), "its ONNX file"))
            return Compared(parity, fidelity(sparse_model, reference, made.preprocessing, val, options.fixed_images))

    inputs = {
        "engines": [_identity(e) for e in (engines.dense, engines.sparse)],
        "others": {name: m.sha256 for name, m in others.items()},
        "val": images.sets.val.sha256 if images and val else None,
        "options": options,
    }
    return job.ws.stage("compare", Compared, inputs, work)


def clock(job: Job, engines: Engines) -> TimingReport:
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


def report(job: Job, found: RunReport) -> ReportFiles:
    """report.json and report.html."""
    return job.ws.stage(
        "report",
        ReportFiles,
        {"report": encode(found, job.ws.folder)},
        lambda: write_report(found, job.ws.path("report.json"), job.ws.path("report.html")),
    )


@contextlib.contextmanager
def opened(engine: EngineFile) -> Iterator[Classifier]:
    """An engine opened for images, and closed again."""
    profiles = engine.profiles if engine.backend == TENSORRT else ()
    with Classifier(open_engine(engine), engine.path.name, profiles) as model:
        yield model
