"""The line. This file alone knows the order of the stages."""

from __future__ import annotations

import contextlib
import logging
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
    choose_backend,
    open_engine,
)
from engines.ort import NO_SPARSE_KERNELS, OrtEngine
from exporters.conformance import CheckOptions, check_2to4
from exporters.onnx_export import export_onnx
from pipeline.artifacts import Checkpoint, Deployment, EngineFile, ImageSet, MaskSet, OnnxModel
from pipeline.bake import bake
from pipeline.bundled.digits import load_digits
from pipeline.checkpoint import ModelOptions, load_checkpoint, module_of, weights_file
from pipeline.compare import compare, fidelity
from pipeline.data import Dataset, ImageFiles, Split, identify, listing_sha256, open_folder, require_disjoint
from pipeline.deploy import DeployOptions, deploy
from pipeline.errors import InputError
from pipeline.files import read_bytes, sha256_of, write_atomically
from pipeline.mask import LEARNED, MAGNITUDE, METHODS, MaskOptions, choose_masks, given_masks
from pipeline.models import BUNDLED, folder_name, model_identity
from pipeline.recalibrate import recalibrate
from pipeline.recipe import Recipe
from pipeline.records import encode
from pipeline.report import ReportFiles, RunReport, write_report
from pipeline.reports import ConformanceReport, Fidelity, ParityReport, TimingReport
from pipeline.timing import time_engines
from pipeline.workspace import Workspace

log = logging.getLogger(__name__)

MAGNITUDE_ROW, RECALIBRATED_ROW = "magnitude", "magnitude, recalibrated"


@dataclass(frozen=True)
class LineOptions:
    """What `maskplan engine` was asked for.

    Attributes:
        model: The model and its weights.
        data: Class folders; the bundled digits for the bundled model.
        masks: A method, a mask file, or None: learned where there is data, else magnitude.
        precision: `fp32`, `fp16`, or None: what can run sparse on the backend.
        backend: `auto`, `tensorrt` or `onnxruntime`.
        recipe: Options of the stages.
        repository: Triton's, to deploy to.
        allow_untrained: Deploy even random weights.
        out: The folder to write.
    """

    model: ModelOptions
    data: Path | None
    masks: str | None
    precision: str | None
    backend: str
    recipe: Recipe
    repository: Path | None
    allow_untrained: bool
    out: Path


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
class Finished:
    """What a run leaves: its report, the files of it, and where the engine was deployed."""

    report: RunReport
    files: ReportFiles
    deployment: Deployment | None
    reused: tuple[str, ...]


def run(options: LineOptions) -> Finished:
    """Take a checkpoint to a checked, compared and timed engine.

    Raises:
        PipelineError: Bad input or environment, in one message.
    """
    backend, why = choose_backend(options.backend)
    log.info("backend: %s (%s)", backend, why)
    precision = options.precision or ("fp16" if backend == TENSORRT else "fp32")
    recipe, model = options.recipe, options.model
    identity = _model_key(model)
    with Workspace(options.out) as ws:
        dense = ws.stage("load", Checkpoint, identity, lambda: load_checkpoint(model, ws.path("dense.safetensors")))
        data, sets = _data(ws, options, dense)
        method, masks_file = _method(options.masks, data)
        dense_onnx = _export(ws, model, dense, "dense", recipe)

        mask_options = replace(recipe.mask, method=method)
        masks = ws.stage(
            "mask",
            MaskSet,
            {
                "checkpoint": dense.sha256,
                "options": mask_options if method in METHODS else None,
                "file": sha256_of(masks_file) if masks_file else None,
                "images": [s.sha256 for s in sets.shaping] if sets and method == LEARNED else None,
            },
            lambda: _make_masks(ws, model, dense, mask_options, masks_file, data, sets),
        )
        ws.keep()
        sparse = _bake(ws, model, dense, masks, "sparse", ws.path("sparse.safetensors"), recipe, data, sets)
        sparse_onnx = _export(ws, model, sparse, "sparse", recipe)
        chosen = {"fp32": 0, "fp16": 1}[precision]
        conformance = ws.stage(
            "check",
            ConformanceReport,
            {"onnx": [o.sha256 for o in sparse_onnx], "pattern": str(masks.pattern)},
            lambda: _check(sparse_onnx, chosen, str(masks.pattern)),
        )

        engines = _build(ws, backend, dense_onnx[chosen], sparse_onnx[chosen])
        baselines = _baselines(ws, model, dense, masks, recipe, data, sets)
        parity, faithful = _compare(ws, engines, sparse_onnx[chosen], baselines, sparse, masks, recipe, data, sets)
        timing = _time(ws, engines, recipe)

        report = RunReport(
            model=sparse.provenance,
            precision=precision,
            backend_reason=why,
            seed=model.seed,
            recipe=recipe,
            masks=masks,
            conformance=conformance,
            engine=engines.sparse,
            dense_engine=engines.dense,
            fidelity=faithful,
            parity=parity,
            timing=timing,
        )
        files = ws.stage(
            "report",
            ReportFiles,
            {"report": report_key(report)},
            lambda: write_report(report, ws.path("report.json"), ws.path("report.html")),
        )
        reused = tuple(ws.reused)
    deployment = None
    if options.repository is not None:
        name = folder_name(model.model)
        deployment = deploy(engines.sparse.path, DeployOptions(options.repository, name, options.allow_untrained))
    return Finished(report, files, deployment, reused)


@dataclass(frozen=True)
class _Engines:
    """The three of a fair comparison; `pruned` is `sparse` itself where the runtime has no sparse flag."""

    dense: EngineFile
    pruned: EngineFile
    sparse: EngineFile


def _model_key(model: ModelOptions) -> dict[str, object]:
    file = weights_file(model)
    return {
        "model": model_identity(model.model),
        "weights": sha256_of(file) if file is not None else model.weights,
        "classes": model.classes,
        # A file or a library's weights leave nothing to chance.
        "seed": model.seed if model.weights in ("auto", "random") else None,
    }


def _data(ws: Workspace, options: LineOptions, dense: Checkpoint) -> tuple[Dataset | None, ImageSets | None]:
    """Open the data and look at every image once; a folder that has not changed is not read again."""
    provenance = dense.provenance
    if options.data is not None:
        data = open_folder(options.data, provenance.labels, provenance.classes, options.model.seed)
        listing = [listing_sha256(s.images) for s in (data.train, data.val) if isinstance(s.images, ImageFiles)]
    elif options.model.model == BUNDLED and provenance.classes == 10:
        data, listing = load_digits(), ["bundled digits"]
    else:
        return None, None
    sets = ws.stage(
        "images",
        ImageSets,
        {"listing": listing, "seed": options.model.seed},
        lambda: ImageSets(identify(data.train), identify(data.select), identify(data.val)),
    )
    require_disjoint(sets.val, (*sets.shaping, *provenance.image_sets))
    return data, sets


def _method(asked: str | None, data: Dataset | None) -> tuple[str, Path | None]:
    """The mask method, or `file` and the file."""
    if asked is None:
        if data is None:
            log.warning("no images: magnitude masks; give --data DIR for learned ones")
        return (LEARNED if data is not None else MAGNITUDE), None
    if asked in METHODS:
        if asked == LEARNED and data is None:
            raise InputError("learned masks need images", fix="give --data DIR with train/ and val/, or choose --masks magnitude")
        return asked, None
    path = Path(asked)
    if not path.suffix and not path.exists():
        raise InputError(f"unknown mask method {asked!r}", fix=f"choose one of {', '.join(METHODS)}, or give a mask file")
    return "file", path


def _export(ws: Workspace, model: ModelOptions, checkpoint: Checkpoint, name: str, recipe: Recipe) -> tuple[OnnxModel, ...]:
    exported = ws.stage(
        f"export-{name}",
        Exported,
        {"checkpoint": checkpoint.sha256, "options": recipe.export},
        lambda: Exported(
            *export_onnx(
                module_of(model, checkpoint),
                checkpoint.provenance,
                recipe.export,
                {"fp32": ws.path(f"{name}.onnx"), "fp16": ws.path(f"{name}.fp16.onnx")},
            )
        ),
    )
    return exported.fp32, exported.fp16


@dataclass(frozen=True)
class Exported:
    """One model in both precisions."""

    fp32: OnnxModel
    fp16: OnnxModel


def _make_masks(
    ws: Workspace,
    model: ModelOptions,
    dense: Checkpoint,
    options: MaskOptions,
    file: Path | None,
    data: Dataset | None,
    sets: ImageSets | None,
) -> MaskSet:
    module = module_of(model, dense)
    out = ws.path("masks.safetensors")
    if file is not None:
        given = given_masks(module, dense.provenance, file)
        return replace(given, path=out, sha256=write_atomically(out, read_bytes(file)))
    return choose_masks(module, dense.provenance, options, out, data, sets.shaping if sets else ())


def _bake(
    ws: Workspace,
    model: ModelOptions,
    dense: Checkpoint,
    masks: MaskSet,
    name: str,
    out: Path,
    recipe: Recipe,
    data: Dataset | None,
    sets: ImageSets | None,
) -> Checkpoint:
    """Bake, and recalibrate where there are images."""
    recalibrating = data is not None and sets is not None and recipe.recalibrate.images > 0
    baked = ws.stage(
        f"bake-{name}",
        Checkpoint,
        {"checkpoint": dense.sha256, "masks": masks.sha256},
        lambda: bake(
            module_of(model, dense),
            dense.provenance,
            masks,
            ws.hidden(f"{name}-baked.safetensors") if recalibrating else out,
        ),
    )
    if data is None or sets is None or not recalibrating:
        return baked
    return ws.stage(
        f"recalibrate-{name}",
        Checkpoint,
        {"checkpoint": baked.sha256, "images": sets.train.sha256, "options": recipe.recalibrate},
        lambda: recalibrate(
            module_of(model, baked), baked.provenance, data.train, recipe.recalibrate, out, (sets.train,)
        ),
    )


def _check(models: tuple[OnnxModel, ...], chosen: int, pattern: str) -> ConformanceReport:
    """Check both precisions; report the one that the engine is built from, and refuse to go on if either fails."""
    reports = [check_2to4(m.path, CheckOptions(pattern=pattern)) for m in models]
    for model, report in zip(models, reports, strict=True):
        if not report.passed:
            raise ConformanceFailure(model.path, report)
    return reports[chosen]


class ConformanceFailure(Exception):
    """The line made a file that does not conform: a gate that failed, not bad input."""

    def __init__(self, path: Path, report: ConformanceReport) -> None:
        super().__init__(f"{path.name} is not {report.pattern}: {report.reason}")
        self.report = report


def _build(ws: Workspace, backend: str, dense: OnnxModel, sparse: OnnxModel) -> _Engines:
    def build(name: str, model: OnnxModel, out: Path, sparse_weights: bool) -> EngineFile:
        options = BuildOptions(backend, sparse_weights=sparse_weights)
        return ws.stage(
            f"build-{name}",
            EngineFile,
            {"onnx": model.sha256, "options": options},
            lambda: build_engine(model, options, out),
        )

    suffix = SUFFIX[backend]
    sparse_engine = build("sparse", sparse, ws.path(f"engine{suffix}"), True)
    dense_engine = build("dense", dense, ws.path(f"dense_engine{suffix}"), False)
    if backend == ONNXRUNTIME:
        return _Engines(dense_engine, sparse_engine, sparse_engine)
    return _Engines(dense_engine, build("pruned", sparse, ws.hidden(f"pruned_engine{suffix}"), False), sparse_engine)


def _baselines(
    ws: Workspace,
    model: ModelOptions,
    dense: Checkpoint,
    masks: MaskSet,
    recipe: Recipe,
    data: Dataset | None,
    sets: ImageSets | None,
) -> dict[str, OnnxModel]:
    """Magnitude masks on the same layers, without and with recalibration, to stand beside the chosen ones."""
    if data is None or not dense.provenance.trained:
        return {}
    method = replace(recipe.mask, method=MAGNITUDE, pattern=str(masks.pattern))
    magnitude = ws.stage(
        "baseline-mask",
        MaskSet,
        {"checkpoint": dense.sha256, "options": method, "layers": [m.name for m in masks.masked]},
        lambda: choose_masks(
            module_of(model, dense),
            dense.provenance,
            method,
            ws.hidden("magnitude-masks.safetensors"),
            only=[m.name for m in masks.masked],
        ),
    )
    plain = replace(recipe, recalibrate=replace(recipe.recalibrate, images=0))
    rows = {MAGNITUDE_ROW: ("magnitude", plain)}
    if masks.method != MAGNITUDE:
        rows[RECALIBRATED_ROW] = ("magnitude-recalibrated", recipe)
    made = {}
    for row, (name, how) in rows.items():
        baked = _bake(ws, model, dense, magnitude, name, ws.hidden(f"{name}.safetensors"), how, data, sets)
        made[row] = _export_hidden(ws, model, baked, name, recipe)
    return made


def _export_hidden(ws: Workspace, model: ModelOptions, checkpoint: Checkpoint, name: str, recipe: Recipe) -> OnnxModel:
    return ws.stage(
        f"export-{name}",
        OnnxModel,
        {"checkpoint": checkpoint.sha256, "options": recipe.export},
        lambda: export_onnx(
            module_of(model, checkpoint), checkpoint.provenance, recipe.export, {"fp32": ws.hidden(f"{name}.onnx")}
        )[0],
    )


@dataclass(frozen=True)
class Compared:
    """Both verdicts of the compare stage."""

    parity: ParityReport
    fidelity: Fidelity


def _compare(
    ws: Workspace,
    engines: _Engines,
    own_onnx: OnnxModel,
    baselines: Mapping[str, OnnxModel],
    sparse: Checkpoint,
    masks: MaskSet,
    recipe: Recipe,
    data: Dataset | None,
    sets: ImageSets | None,
) -> tuple[ParityReport, Fidelity]:
    val = data.val if data is not None else None
    how = sparse.provenance.preprocessing

    def work() -> Compared:
        with contextlib.ExitStack() as stack:
            dense_model = stack.enter_context(classifier(engines.dense))
            sparse_model = stack.enter_context(classifier(engines.sparse))
            others = {
                name: stack.enter_context(Classifier(OrtEngine(model.path), name)) for name, model in baselines.items()
            }
            parity = compare(
                dense_model,
                sparse_model,
                how,
                [engines.dense.provenance, engines.sparse.provenance],
                _fitting(val, sparse),
                recipe.compare,
                others,
                {RECALIBRATED_ROW: True, "sparse": sparse.provenance.recalibrated_images > 0},
            )
            name = masks.method + (", recalibrated" if sparse.provenance.recalibrated_images else "")
            parity = replace(
                parity, methods=tuple(replace(r, name=name) if r.name == "sparse" else r for r in parity.methods)
            )
            reference = stack.enter_context(Classifier(OrtEngine(own_onnx.path, optimised=False), "its ONNX file"))
            return Compared(
                parity, fidelity(sparse_model, reference, how, _fitting(val, sparse), recipe.compare.fixed_images)
            )

    compared = ws.stage(
        "compare",
        Compared,
        {
            "engines": [engines.dense.sha256, engines.sparse.sha256, *(m.sha256 for m in baselines.values())],
            "val": sets.val.sha256 if sets else None,
            "options": recipe.compare,
        },
        work,
    )
    return compared.parity, compared.fidelity


def _fitting(val: Split | None, sparse: Checkpoint) -> Split | None:
    """Labelled images say nothing about random weights."""
    return val if sparse.provenance.trained else None


def _time(ws: Workspace, engines: _Engines, recipe: Recipe) -> TimingReport:
    same_file = engines.pruned == engines.sparse

    def work() -> TimingReport:
        with (
            classifier(engines.dense) as dense,
            classifier(engines.sparse) as sparse,
            classifier(engines.pruned) as pruned,
        ):
            return time_engines(
                dense,
                sparse,
                pruned,
                recipe.time,
                note=NO_SPARSE_KERNELS if engines.sparse.backend == ONNXRUNTIME else "",
                same_file=same_file,
                device=None if engines.sparse.backend == ONNXRUNTIME else engines.sparse.device,
            )

    return ws.stage(
        "time",
        TimingReport,
        {"engines": [engines.dense.sha256, engines.pruned.sha256, engines.sparse.sha256], "options": recipe.time},
        work,
    )


@contextlib.contextmanager
def classifier(engine: EngineFile) -> Iterator[Classifier]:
    """An engine opened for images, and closed again."""
    profiles = engine.profiles if engine.backend == TENSORRT else ()
    with Classifier(open_engine(engine), engine.path.name, profiles) as opened:
        yield opened


def report_key(report: RunReport) -> object:
    """What decides a report's content: all of it but the folder."""
    return encode(report, report.engine.path.parent)
