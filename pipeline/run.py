"""The line. This file alone knows the order of the stages."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from maskplan.engines.build import choose_backend
from maskplan.pipeline.core.artifacts import Checkpoint, Deployment, EngineFile, MaskSet, OnnxModel
from maskplan.pipeline.core.choices import (
    AUTO,
    CHANNEL,
    DANHOFER2024,
    FAIL,
    FP16,
    FP32,
    INT8,
    LAYERWISE,
    LEARNED,
    TENSORRT,
)
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.reports import CalibrationReport, ConformanceReport, PassFigures, Refinement, TimingReport
from maskplan.pipeline.data.dataset import Dataset, open_folder
from maskplan.pipeline.data.digits import load_digits
from maskplan.pipeline.models.checkpoint import ModelOptions
from maskplan.pipeline.models.registry import BUNDLED, folder_name
from maskplan.pipeline.pruning.mask import DEPLOYABLE, method_for
from maskplan.pipeline.recipe import Recipe
from maskplan.pipeline.report.record import ReportFiles, RunReport
from maskplan.pipeline.stages import engines as engine_stages
from maskplan.pipeline.stages import model as stages
from maskplan.pipeline.stages import report as report_stages
from maskplan.pipeline.stages.refine import FIRST, REFINED, better, figures, layers_to_restore, why_skip
from maskplan.pipeline.stages.workspace import Workspace
from maskplan.pipeline.triton.deploy import DeployOptions, deploy
from maskplan.pipeline.triton.golden import golden_of

log = logging.getLogger(__name__)

_AS_GIVEN = stages.Reordered(None, None)


@dataclass(frozen=True)
class LineOptions:
    """What `maskplan engine` was asked for.

    Attributes:
        model: The model and its weights.
        data: Class folders; the bundled digits for the bundled model.
        masks: A method, a mask file, or None: as the recipe says.
        precision: `fp32`, `fp16`, `int8`, or None: what can run sparse on the backend.
        backend: `auto`, `tensorrt` or `onnxruntime`.
        recipe: Options of the stages.
        repository: Triton's, to deploy to.
        allow_untrained: Deploy even random weights.
        out: The folder to write.
        permute: Bring channels into an order that masks keep more of first.
        device: Where masks are learned: `auto`, `cpu` or `cuda`.
        refine: Give masked layers that the engine runs dense their weights back, build again, keep the better engine.
        command: What was typed, for the report.
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
    device: str = "auto"
    refine: bool = False
    permute: bool = False
    command: str = ""


@dataclass(frozen=True)
class LineResult:
    """What a run leaves: its report, the files of it, where the engine was deployed, and the stages that did not run."""

    report: RunReport
    files: ReportFiles
    deployment: Deployment | None
    reused: tuple[str, ...]


def run(options: LineOptions) -> LineResult:
    """Take a checkpoint to a checked, compared and timed engine.

    Raises:
        PipelineError: Bad input or environment, in one message.
        ConformanceError: The check found weights that are not N:M.
    """
    if DANHOFER2024 in (options.masks, options.recipe.mask.method):
        fix = "choose learned or magnitude; `maskplan mask --method danhofer2024` makes masks for comparison"
        raise InputError("masks by the report's recipe cannot be deployed: their groups do not run along C", fix=fix)
    if options.recipe.mask.layout != CHANNEL:
        fix = "TensorRT takes groups along C: leave the layout at 'channel'"
        raise InputError(f"masks in the layout {options.recipe.mask.layout!r} cannot be deployed", fix=fix)
    backend, why = choose_backend(options.backend)
    log.info("backend: %s (%s)", backend, why)
    fastest = FP16 if backend == TENSORRT else FP32
    precision = options.precision or fastest
    floats = fastest if precision == INT8 else precision
    with Workspace(options.out) as ws:
        job = stages.Job(ws, options.model, options.recipe, options.device)
        dense = stages.load(job)
        data = _data(options, dense)
        if precision == INT8 and data is None:
            raise InputError("INT8 needs images to calibrate on", fix="give --data DIR with train/ and val/")
        images = stages.look_at_images(job, data, dense) if data is not None else None
        how = _method(options.masks, options.recipe.mask.method, data)
        # The dense model first: one that cannot be exported is found out before masks are learned for it.
        dense_onnx = stages.export(job, dense, "dense")
        dense_int8 = stages.quantize(job, dense_onnx, "dense", images) if precision == INT8 else None
        reordered = _permuted(job, dense, how) if options.permute else _AS_GIVEN
        start = reordered.permuted.checkpoint if reordered.permuted is not None else dense
        masks = stages.choose(job, start, how, images)
        ws.keep()
        line = _Line(dense, start, dense_onnx, dense_int8, images, backend, floats, candidates=options.refine)
        kept = _pass(job, line, masks, (dense_int8.models if dense_int8 else dense_onnx).of(floats))
        engine, refinement = kept.engines.sparse, None
        # Layers can only be compared where channels lie in one order.
        reference = dense_onnx.fp32 if start is dense else stages.export_aside(job, start, "permuted")
        if options.refine:
            kept, refinement = _refine(job, line, kept)
            engine = engine_stages.keep_engine(job, kept.engines.sparse)
        found = RunReport(
            model=kept.sparse.provenance,
            precision=precision,
            backend_reason=why,
            seed=options.model.seed,
            recipe=options.recipe,
            masks=kept.masks,
            conformance=kept.conformance,
            calibration=kept.calibration,
            engine=engine,
            dense_engine=kept.engines.dense,
            fidelity=kept.compared.fidelity,
            parity=kept.compared.parity,
            timing=kept.timing,
            refine=refinement,
            permutation=reordered.permuted,
            permutation_reason=reordered.reason,
            depth=report_stages.depth(job, reference, kept.models.fp32, images),
            mask_statistics=report_stages.statistics(job, start, kept.masks),
            command=options.command,
        )
        files = report_stages.report(job, found)
        reused = tuple(ws.reused)
    deployment = None
    if options.repository is not None and found.parity.verdict != FAIL:
        name = folder_name(options.model.model)
        where = DeployOptions(options.repository, name, options.allow_untrained)
        deployment = deploy(engine.path, where, golden_of([engine])[0])
    return LineResult(found, files, deployment, reused)


@dataclass(frozen=True)
class _Line:
    """What both passes start from.

    Attributes:
        dense: The untouched model, which the gate compares with.
        start: What masks are chosen for: `dense`, or the same with its channels in another order.
        dense_int8: The dense model in INT8, where that is asked for.
        floats: `fp32` or `fp16`: the precision, or what stands beside INT8.
        candidates: Put the passes' engines aside, to keep one of them.
    """

    dense: Checkpoint
    start: Checkpoint
    dense_onnx: stages.Exported
    dense_int8: stages.Quantized | None
    images: stages.Images | None
    backend: str
    floats: str
    candidates: bool


@dataclass(frozen=True)
class _Pass:
    """What the line made of one set of masks."""

    masks: MaskSet
    sparse: Checkpoint
    models: stages.Exported
    conformance: ConformanceReport
    calibration: CalibrationReport | None
    engines: engine_stages.Engines
    compared: engine_stages.Compared
    timing: TimingReport

    def figures(self) -> PassFigures:
        return figures(self.engines.sparse, self.masks, self.compared.parity, self.timing)


def _pass(job: stages.Job, line: _Line, masks: MaskSet, dense: OnnxModel | EngineFile) -> _Pass:
    """From masks to a checked, compared and timed engine."""
    images, pattern = line.images, str(masks.pattern)
    sparse = stages.prune(job, line.start, masks, "sparse", job.ws.path("sparse.safetensors"), images)
    exported = stages.export(job, sparse, "sparse")
    checked = stages.check(job, exported, pattern)
    others = stages.baselines(job, line.dense, masks, images)
    models, calibration, untouched = exported, None, None
    if line.dense_int8 is not None:
        quantized = stages.quantize(job, exported, "sparse", images)
        models, calibration, untouched = quantized.models, quantized.report, line.dense_onnx.fp32
        checked = stages.check(job, models, pattern, "check-int8")
        others = stages.beside_int8(line.dense_onnx, line.dense_int8, exported, others)
    own_onnx = models.of(line.floats)
    engines = engine_stages.build(job, line.backend, dense, own_onnx, candidate=line.candidates)
    compared = engine_stages.judge(job, engines, own_onnx, others, sparse, images, untouched)
    timing = engine_stages.time_stage(job, engines)
    return _Pass(masks, sparse, models, checked.of(line.floats), calibration, engines, compared, timing)


def _refine(job: stages.Job, line: _Line, first: _Pass) -> tuple[_Pass, Refinement]:
    """A second pass without the masks that bought nothing; the better of the two, and why."""
    restored = layers_to_restore(first.engines.sparse, first.conformance, first.masks)
    skipped = why_skip(first.engines.sparse, first.conformance, first.masks, restored)
    if skipped is not None:
        log.info("refine: nothing to do: %s", skipped)
        return first, Refinement((), FIRST, skipped, first.figures(), None)
    log.info("refine: %d of %d masked layers run dense", len(restored), len(first.masks.masked))
    again = replace(job, ws=job.ws.apart(REFINED))
    second = _pass(again, line, stages.restore(again, first.masks, restored), first.engines.dense)
    choice = better(first.figures(), second.figures(), restored)
    log.info("refine: the %s engine is kept: %s", choice.kept, choice.reason)
    kept = second if choice.kept == REFINED else first
    return kept, Refinement(restored, choice.kept, choice.reason, first.figures(), second.figures())


def _permuted(job: stages.Job, dense: Checkpoint, how: str | Path) -> stages.Reordered:
    if isinstance(how, Path):
        fix = "leave --permute out, or choose a method: masks are made for one order of the channels"
        raise InputError("masks of a file cannot follow a permutation", where=how, fix=fix)
    return stages.permute(job, dense, how)


def _data(options: LineOptions, dense: Checkpoint) -> Dataset | None:
    made = dense.provenance
    if options.data is not None:
        return open_folder(options.data, made.labels, made.classes, options.model.seed)
    if options.model.model == BUNDLED and made.classes == 10:
        return load_digits()
    return None


def _method(asked: str | None, by_recipe: str, data: Dataset | None) -> str | Path:
    """A mask method, or a mask file."""
    if asked is not None and asked not in (AUTO, *DEPLOYABLE):
        path = Path(asked)
        if not path.suffix and not path.exists():
            fix = f"choose one of {', '.join((AUTO, *DEPLOYABLE))}, or give a mask file"
            raise InputError(f"unknown mask method {asked!r}", fix=fix)
        return path
    chosen = asked or by_recipe
    if chosen in (LEARNED, LAYERWISE) and data is None:
        fix = "give --data DIR with train/ and val/, or choose --masks magnitude"
        raise InputError(f"{chosen} masks need images", fix=fix)
    if chosen == AUTO and data is None:
        log.warning("no images: magnitude masks; give --data DIR for learned ones")
    return method_for(chosen, data is not None)
