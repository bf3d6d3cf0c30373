"""The line from a checkpoint to a deployed engine. Only this file knows the order of the stages."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from maskplan.engines.build import choose_backend
from maskplan.engines.trt.versions import require_buildable
from maskplan.pipeline.core.artifacts import Checkpoint, Deployment, EngineFile, MaskSet, OnnxModel
from maskplan.pipeline.core.choices import (
    CHANNEL,
    DANHOFER2024,
    FAIL,
    FP16,
    FP32,
    GPU_BACKENDS,
    INT8,
    LAYERWISE,
    MAGNITUDE,
    Backend,
    FloatPrecision,
    MaskMethod,
    Precision,
)
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.refinement import PassFigures, Refinement
from maskplan.pipeline.core.reports import ConformanceReport
from maskplan.pipeline.data.dataset import Dataset
from maskplan.pipeline.data.few_images import limit_images
from maskplan.pipeline.data.source import find_dataset
from maskplan.pipeline.data.synthetic import refuse_data
from maskplan.pipeline.models.checkpoint import ModelOptions
from maskplan.pipeline.models.registry import folder_name
from maskplan.pipeline.pruning.method import method_or_file, resolve_method
from maskplan.pipeline.recipe import Recipe
from maskplan.pipeline.report.record import ReportFiles, RunReport
from maskplan.pipeline.stages import compare, engines, model, onnx_files, onnx_source, report
from maskplan.pipeline.stages.compile import compile_files
from maskplan.pipeline.stages.job import Images, Job, Network, PermuteResult
from maskplan.pipeline.stages.refine import FIRST, REFINED, better, figures, layers_to_restore, why_skip
from maskplan.pipeline.stages.workspace import Workspace
from maskplan.pipeline.triton.config import require_platform
from maskplan.pipeline.triton.deploy import DeployOptions
from maskplan.pipeline.triton.deploy import deploy as deploy_engine
from maskplan.pipeline.triton.golden import golden_of
from maskplan.pipeline.triton.repository import require_deployable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LineOptions:
    """What `maskplan engine` was asked for.

    Attributes:
        model: The model and its weights.
        data: Class folders; None takes the bundled digits for the bundled model.
        masks: A method, a mask file, or None: as the recipe says.
        precision: None takes the precision that can run sparse on the backend.
        backend: `auto` or a backend.
        recipe: Options of the stages.
        repository: Triton model repository to deploy to.
        allow_untrained: Deploy random weights too.
        out: The folder to write.
        device: Device that learns masks: `auto`, `cpu` or `cuda`.
        refine: Restore the dense weights of masked layers that the engine runs dense, build again, keep the better engine.
        permute: First reorder channels so that masks keep more.
        command: The command line, for the report.
        metric: `FILE.py:FUNCTION` of the user's metric; outputs are then compared instead of classes.
        images: At most this many images of the training part are used, for everything; None uses all.
        synthetic: Without data, choose masks and statistics by images that are made from the network.
    """

    model: ModelOptions
    data: Path | None
    masks: str | None
    precision: Precision | None
    backend: str
    recipe: Recipe
    repository: Path | None
    allow_untrained: bool
    out: Path
    device: str = "auto"
    refine: bool = False
    permute: bool = False
    command: str = ""
    metric: str | None = None
    images: int | None = None
    synthetic: bool = False


@dataclass(frozen=True)
class OnnxLineOptions:
    """What `maskplan engine model.onnx` was asked for; the fields that `LineOptions` has too are explained there.

    Attributes:
        source: The file, its data, and what its inputs and outputs hold.
        masks: `layerwise`, `magnitude`, or None: layer-wise where there is data.
    """

    source: onnx_source.Source
    masks: MaskMethod | None
    precision: Precision | None
    backend: str
    recipe: Recipe
    repository: Path | None
    out: Path
    seed: int = 0
    command: str = ""


@dataclass(frozen=True)
class LineResult:
    """The report of a run, its files, the deployment if there was one, and the stages that did not have to run."""

    report: RunReport
    files: ReportFiles
    deployment: Deployment | None
    reused: tuple[str, ...]


@dataclass(frozen=True)
class _Target:
    """What engines are built for; `float_precision` is what an INT8 engine runs in where it is not INT8."""

    backend: Backend
    precision: Precision
    float_precision: FloatPrecision


@dataclass(frozen=True)
class _Pass:
    """What the line made of one set of masks; `ran` are the built engines, or what runs in their place on this host."""

    job: Job
    masks: MaskSet
    sparse: Network
    conformance: ConformanceReport
    rows: Mapping[str, OnnxModel]
    built: engines.Engines
    ran: engines.Engines


def run(options: LineOptions) -> LineResult:
    """Take a checkpoint to a checked, compared and timed engine.

    Raises:
        PipelineError: Bad input or environment, in one message.
        ConformanceError: The check found weights that are not N:M.
    """
    _require_deployable_masks(options)
    backend, reason = choose_backend(options.backend)
    if options.repository is not None:
        require_platform(backend)
        require_deployable(options.repository, folder_name(options.model.model))
    if backend in GPU_BACKENDS:
        require_buildable(backend, options.recipe.tensorrt)
    log.info("backend: %s (%s)", backend, reason)
    target = _target(backend, options.precision)
    with Workspace(options.out) as ws:
        job = Job(ws, options.model, options.recipe, options.device)
        checkpoint, job = model.load(job)
        data = _data(options, checkpoint)
        if target.precision == INT8 and data is None and not options.synthetic:
            raise InputError("INT8 needs images to calibrate on", fix="give --data DIR with train/ and val/")
        images = model.identify_images(job, data, checkpoint) if data is not None else None
        # Synthetic images choose masks, statistics and ranges; they do not tell how good these are.
        shaping = model.synthesize(job, checkpoint) if options.synthetic else images
        method = _method(options, data)

        # The dense model first: a model that cannot be exported fails before masks are learned for it.
        dense = onnx_files.export(job, checkpoint, "dense")
        if target.precision == INT8:
            dense = onnx_files.calibrate(job, dense, "dense", shaping)
        permuted = _permute(job, checkpoint, method) if options.permute else PermuteResult(None, None)
        start = permuted.permuted.checkpoint if permuted.permuted is not None else checkpoint
        masks = model.mask(job, start, method, shaping)
        ws.keep()

        dense_onnx = dense.deployed.of(target.float_precision)
        kept = _from_masks_to_engine(job, target, dense, start, masks, dense_onnx, shaping, candidate=options.refine)
        engine, refinement = kept.built.sparse, None
        if options.refine:
            kept, refinement = _refine(target, dense, start, kept, images, shaping)
            engine = engines.keep_engine(job, kept.built.sparse)
        compiled = compile_files(job, backend, dense.deployed.fp16, kept.sparse.deployed.fp16)
        compared = compare.compare(
            kept.job, kept.ran, target.float_precision, dense, kept.sparse, kept.rows, images, options.metric
        )
        timing = engines.time_stage(kept.job, kept.ran)
        # Layers can only be compared where the channels are in one order.
        in_same_order = dense.floats.fp32 if start is checkpoint else onnx_files.export_fp32(job, start, "permuted")

        result = RunReport(
            model=kept.sparse.checkpoint.provenance,
            precision=target.precision,
            backend_reason=reason,
            seed=options.model.seed,
            recipe=options.recipe,
            masks=kept.masks,
            conformance=kept.conformance,
            calibration=kept.sparse.int8.report if kept.sparse.int8 is not None else None,
            engine=engine,
            dense_engine=kept.built.dense,
            fidelity=compared.fidelity,
            parity=compared.parity,
            timing=timing,
            refine=refinement,
            permutation=permuted.permuted,
            permutation_reason=permuted.reason,
            depth=report.measure_depth(job, in_same_order, kept.sparse.deployed.fp32, images),
            mask_statistics=report.measure_statistics(job, start, kept.masks),
            command=options.command,
            compile=compiled.report,
            compile_reason=compiled.reason,
            stand_in=None if kept.ran.stands_in_for is None else kept.ran.sparse.backend,
        )
        files = report.write(job, result)
        reused = tuple(ws.reused)
    return LineResult(result, files, _deploy(options, result), reused)


def run_onnx(options: OnnxLineOptions) -> LineResult:
    """Take an ONNX file, whose network needs not be known, to a checked, compared and timed engine.

    Raises:
        PipelineError: Bad input or environment, in one message.
        ConformanceError: The check found weights that are not N:M.
    """
    source, name = options.source, folder_name(options.source.path.stem)
    backend, reason = choose_backend(options.backend)
    if options.repository is not None:
        require_platform(backend)
        require_deployable(options.repository, name)
    if backend in GPU_BACKENDS:
        require_buildable(backend, options.recipe.tensorrt)
    log.info("backend: %s (%s)", backend, reason)
    target = _target(backend, options.precision)
    if target.precision == INT8 and source.data is None:
        raise InputError("INT8 needs samples to calibrate on", fix="give --data, a folder of images or a .npz file")
    method = options.masks or (LAYERWISE if source.data is not None else MAGNITUDE)
    if method == LAYERWISE and source.data is None:
        raise InputError("layer-wise masks need samples", fix="give --data, a folder of images or a .npz file")
    with Workspace(options.out) as ws:
        recipe = replace(options.recipe, time=replace(options.recipe.time, shape=source.images.shape))
        job = Job(ws, ModelOptions(source.path.name, seed=options.seed), recipe)
        dense = onnx_source.copy_source(job, source)
        shapes = onnx_source.sample_shapes(source, dense)
        shapes_network = method == LAYERWISE or target.precision == INT8
        sets = onnx_source.identify_samples(source, dense, shapes_network=shapes_network)
        pruned = onnx_source.prune(job, source, dense, method, sets)
        ws.keep()

        calibration = None
        dense_end, sparse_end = dense, pruned.onnx
        if target.precision == INT8:
            quantized = [
                onnx_source.calibrate(job, source, file, label, target.float_precision, sets)
                for label, file in (("dense", dense_end), ("sparse", sparse_end))
            ]
            dense_end, sparse_end = (each.onnx for each in quantized)
            calibration = quantized[1].report
        elif target.float_precision == FP16:
            dense_end = onnx_source.to_fp16(job, source, dense_end, "dense")
            sparse_end = onnx_source.to_fp16(job, source, sparse_end, "sparse")
        conformance = onnx_source.check(job, sparse_end, pruned.kept_dense)
        profiles = onnx_source.profiles(dense_end, shapes, options.recipe.time.batches)
        built = engines.build(job, backend, dense_end, sparse_end, profiles=profiles)
        ran = engines.runnable(job, built, dense_end, sparse_end)
        untouched = dense if target.precision == INT8 else None
        parity = onnx_source.compare(job, source, ran, sets, untouched)
        timing = engines.time_stage(job, ran, source.samples("val", dense.inputs), sets.get("val"))

        masks = onnx_source.mask_set(source, dense, pruned, method, conformance)
        result = RunReport(
            model=onnx_source.provenance_of(source, dense, method, masks, sets),
            precision=target.precision,
            backend_reason=reason,
            seed=options.seed,
            recipe=options.recipe,
            masks=masks,
            conformance=conformance,
            calibration=calibration,
            engine=built.sparse,
            dense_engine=built.dense,
            fidelity=None,
            parity=parity,
            timing=timing,
            command=options.command,
            stand_in=None if ran.stands_in_for is None else ran.sparse.backend,
        )
        files = report.write(job, result)
        reused = tuple(ws.reused)
    deployment = None
    if options.repository is not None and parity.verdict != FAIL:
        golden = golden_of([result.engine], shapes)[0]
        deployment = deploy_engine(result.engine.path, DeployOptions(options.repository, name), golden)
    return LineResult(result, files, deployment, reused)


def _from_masks_to_engine(
    job: Job,
    target: _Target,
    dense: Network,
    start: Checkpoint,
    masks: MaskSet,
    dense_source: OnnxModel | EngineFile,
    images: Images | None,
    *,
    candidate: bool,
) -> _Pass:
    """Bake, export, check and build one set of masks.

    Args:
        job: The run.
        target: What to build for.
        dense: The untouched network, which the gate compares with.
        start: The checkpoint that the masks were chosen for: that of `dense`, or the same with permuted channels.
        masks: The masks.
        dense_source: The dense ONNX file, or its engine from an earlier pass.
        images: The images that choose statistics and ranges, where there are any.
        candidate: The engine is one of two of which one will be kept.
    """
    pattern = str(masks.pattern)
    final = job.ws.path("sparse.safetensors")
    if images is not None and model.recalibrates(job, images):
        baked = model.bake_masks(job, start, masks, "sparse", job.ws.hidden("sparse-baked.safetensors"))
        pruned = model.recalibrate_statistics(job, start, baked, images, "sparse", final)
    else:
        pruned = model.bake_masks(job, start, masks, "sparse", final)
    sparse = onnx_files.export(job, pruned, "sparse")
    conformance = onnx_files.check(job, sparse, pattern)
    baselines = onnx_files.magnitude_rows(job, dense.checkpoint, masks, images)
    if target.precision == INT8:
        sparse = onnx_files.calibrate(job, sparse, "sparse", images)
        conformance = onnx_files.check(job, sparse, pattern)
    rows = onnx_files.comparison_rows(dense, sparse, baselines)
    sparse_onnx = sparse.deployed.of(target.float_precision)
    built = engines.build(job, target.backend, dense_source, sparse_onnx, candidate=candidate)
    ran = engines.runnable(job, built, dense.deployed.of(target.float_precision), sparse_onnx)
    return _Pass(job, masks, sparse, conformance.of(target.float_precision), rows, built, ran)


def _refine(
    target: _Target, dense: Network, start: Checkpoint, first: _Pass, images: Images | None, shaping: Images | None
) -> tuple[_Pass, Refinement]:
    """A second pass without the masks of layers that run dense; returns the better pass and the reason.

    The choice is made on `select`: `val` is read once, for the engine that is kept.
    """
    restored = layers_to_restore(first.built.sparse, first.conformance, first.masks)
    skipped = why_skip(first.built.sparse, first.conformance, first.masks, restored)
    if skipped is not None:
        log.info("refine: nothing to do: %s", skipped)
        return first, Refinement((), FIRST, skipped, figures(first.built.sparse, first.masks), None)
    log.info("refine: %d of %d masked layers run dense", len(restored), len(first.masks.masked))
    again = replace(first.job, ws=first.job.ws.with_prefix(REFINED))
    masks = model.restore_dense(again, first.masks, restored)
    second = _from_masks_to_engine(again, target, dense, start, masks, first.built.dense, shaping, candidate=True)
    first_figures, second_figures = (_figures_on_select(p, dense, images) for p in (first, second))
    choice = better(first_figures, second_figures, restored)
    log.info("refine: the %s engine is kept: %s", choice.kept, choice.reason)
    kept = second if choice.kept == REFINED else first
    return kept, Refinement(restored, choice.kept, choice.reason, first_figures, second_figures)


def _figures_on_select(candidate: _Pass, dense: Network, images: Images | None) -> PassFigures:
    parity = compare.compare_on_select(candidate.job, candidate.ran, dense, candidate.sparse, images)
    timing = engines.time_stage(candidate.job, candidate.ran)
    return figures(candidate.built.sparse, candidate.masks, parity, timing)


def _permute(job: Job, dense: Checkpoint, method: MaskMethod | Path) -> PermuteResult:
    if isinstance(method, Path):
        fix = "leave out --permute, or choose a method: the masks of a file are for one order of the channels"
        raise InputError("masks from a file cannot be combined with a permutation", where=method, fix=fix)
    return model.permute(job, dense, method)


def _deploy(options: LineOptions, result: RunReport) -> Deployment | None:
    """Deploy to the repository that was given, unless the parity gate failed."""
    if options.repository is None or result.parity.verdict == FAIL:
        return None
    name = folder_name(options.model.model)
    deploy_options = DeployOptions(options.repository, name, options.allow_untrained)
    return deploy_engine(result.engine.path, deploy_options, golden_of([result.engine])[0])


def _target(backend: Backend, precision: Precision | None) -> _Target:
    default: FloatPrecision = FP16 if backend in GPU_BACKENDS else FP32
    if precision is None:
        return _Target(backend, default, default)
    return _Target(backend, precision, default if precision == INT8 else precision)


def _require_deployable_masks(options: LineOptions) -> None:
    if DANHOFER2024 in (options.masks, options.recipe.mask.method):
        fix = f"choose learned or magnitude; `maskplan mask --method {DANHOFER2024}` makes such masks for comparison"
        raise InputError(f"{DANHOFER2024} masks cannot be deployed: their groups do not run along C", fix=fix)
    if options.recipe.mask.layout != CHANNEL:
        fix = "TensorRT needs groups along C: leave the layout at 'channel'"
        raise InputError(f"masks in the layout {options.recipe.mask.layout!r} cannot be deployed", fix=fix)


def _data(options: LineOptions, dense: Checkpoint) -> Dataset | None:
    provenance = dense.provenance
    if options.synthetic:
        refuse_data(options.data)
        return None
    data = find_dataset(
        options.data,
        model=options.model.model,
        labels=provenance.labels,
        outputs=provenance.classes,
        seed=options.model.seed,
    )
    return data if data is None or options.images is None else limit_images(data, options.images, options.model.seed)


def _method(options: LineOptions, data: Dataset | None) -> MaskMethod | Path:
    """A mask method, or a mask file."""
    masks = options.recipe.mask.method if options.masks is None else method_or_file(options.masks)
    if isinstance(masks, Path):
        return masks
    return resolve_method(masks, has_images=data is not None or options.synthetic, synthetic=options.synthetic)
