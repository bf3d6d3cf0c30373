"""The stages on ONNX files: export, check, calibrate, and the files that stand as rows in the table of accuracies."""

from __future__ import annotations

from dataclasses import replace

from maskplan.calibration.calibrate import CalibrationImages
from maskplan.calibration.calibrate import calibrate as calibrate_onnx
from maskplan.exporters.conformance import CheckOptions, require_2to4
from maskplan.exporters.onnx_export import export_onnx
from maskplan.pipeline.core.artifacts import Checkpoint, MaskSet, OnnxModel, Provenance
from maskplan.pipeline.core.choices import FP16, FP32, INT8, MAGNITUDE, OnnxPrecision
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.reports import ConformanceReport
from maskplan.pipeline.data.synthetic import synthetic_count
from maskplan.pipeline.models.checkpoint import load_module
from maskplan.pipeline.pruning.mask import choose_masks
from maskplan.pipeline.stages.job import ConformancePair, Images, Job, Network, OnnxPair, Quantized
from maskplan.pipeline.stages.model import bake_masks, recalibrate_statistics, recalibrates


def export(job: Job, checkpoint: Checkpoint, name: str) -> Network:
    """Write `NAME.onnx` and `NAME.fp16.onnx`."""
    paths = {FP32: job.ws.path(f"{name}.onnx"), FP16: job.ws.path(f"{name}.fp16.onnx")}
    pair = job.ws.stage(
        f"export-{name}",
        OnnxPair,
        {"checkpoint": checkpoint.sha256, "options": job.recipe.export, **job.code_key},
        lambda: OnnxPair(
            *export_onnx(load_module(job.model, checkpoint), checkpoint.provenance, job.recipe.export, paths)
        ),
    )
    return Network(checkpoint, pair)


def export_fp32(job: Job, checkpoint: Checkpoint, name: str) -> OnnxModel:
    """Write an FP32 ONNX file between stages, for a comparison."""
    paths = {FP32: job.ws.hidden(f"{name}.onnx")}
    return job.ws.stage(
        f"export-{name}",
        OnnxModel,
        {"checkpoint": checkpoint.sha256, "options": job.recipe.export, **job.code_key},
        lambda: export_onnx(load_module(job.model, checkpoint), checkpoint.provenance, job.recipe.export, paths)[0],
    )


def check(job: Job, network: Network, pattern: str) -> ConformancePair:
    """Check both of the files that engines are built from, so that the engine can be built from either elsewhere.

    Raises:
        ConformanceError: One of them is not N:M.
    """

    def check_one(model: OnnxModel) -> ConformanceReport:
        return require_2to4(model.path, CheckOptions(pattern=pattern))

    pair = network.deployed
    name = "check" if network.int8 is None else "check-int8"
    inputs = {"onnx": [pair.fp32.sha256, pair.fp16.sha256], "pattern": pattern}
    return job.ws.stage(
        name, ConformancePair, inputs, lambda: ConformancePair(check_one(pair.fp32), check_one(pair.fp16))
    )


def calibrate(job: Job, network: Network, name: str, images: Images | None) -> Network:
    """Write `NAME.int8.onnx` (FP32 elsewhere), `NAME.int8.fp16.onnx` (FP16 elsewhere) and, for readers, `NAME.ranges.json`.

    Raises:
        InputError: There are no images to calibrate on.
    """
    if images is None:
        raise InputError("INT8 needs images to calibrate on", fix="give --data DIR with train/ and val/")
    options, source = job.recipe.calibrate, network.floats.fp32
    paths = {FP32: job.ws.path(f"{name}.int8.onnx"), FP16: job.ws.path(f"{name}.int8.fp16.onnx")}
    preprocessing = network.checkpoint.provenance.preprocessing

    def work() -> Quantized:
        calibration_images = CalibrationImages(images.data.train, images.data.select, preprocessing)
        ranges = job.ws.path(f"{name}.ranges.json")
        # The stage runs because inputs or options changed; ranges of others would be refused.
        ranges.unlink(missing_ok=True)
        calibrated = calibrate_onnx(source, calibration_images, options, paths, ranges)
        return Quantized(OnnxPair(*calibrated.models), calibrated.report)

    inputs = {
        "onnx": source.sha256,
        "images": [s.key for s in images.sets.shaping],
        "options": options,
    }
    return replace(network, int8=job.ws.stage(f"calibrate-{name}", Quantized, inputs, work))


def magnitude_rows(job: Job, dense: Checkpoint, masks: MaskSet, images: Images | None) -> dict[str, OnnxModel]:
    """Magnitude masks on the same layers, without and with recalibration: the baselines of the table of accuracies.

    They are for the channels in the model's own order, so that what a permutation gains shows too.
    """
    if images is None or not len(images.data.val) or not dense.provenance.trained:
        return {}
    names = [m.name for m in masks.masked]
    options = replace(job.recipe.mask, method=MAGNITUDE, pattern=str(masks.pattern), layout=masks.layout)
    out = job.ws.hidden("magnitude-masks.safetensors")
    magnitude = job.ws.stage(
        "baseline-mask",
        MaskSet,
        {"checkpoint": dense.sha256, "options": options, "layers": names, **job.code_key},
        lambda: choose_masks(load_module(job.model, dense), dense.provenance, options, out, only=names),
    )
    baked = bake_masks(job, dense, magnitude, "magnitude", job.ws.hidden("magnitude.safetensors"))
    rows = {row_name(baked.provenance): export_fp32(job, baked, "magnitude")}
    # The chosen masks may be these; without BatchNorm there is nothing to recalibrate, and one row is enough.
    is_chosen = masks.method == MAGNITUDE and masks.permutation is None
    if recalibrates(job, images) and not is_chosen:
        name = "magnitude-recalibrated"
        out = job.ws.hidden(f"{name}.safetensors")
        recalibrated = recalibrate_statistics(job, dense, baked, images, name, out)
        row = row_name(recalibrated.provenance)
        if row not in rows:
            rows[row] = export_fp32(job, recalibrated, name)
    return rows


def comparison_rows(dense: Network, sparse: Network, baselines: dict[str, OnnxModel]) -> dict[str, OnnxModel]:
    """The rows of the table of accuracies besides the reference and the sparse engine.

    In an INT8 run the table shows both networks in every precision: the reference is dense FP32, the engine sparse INT8.
    """
    if dense.int8 is None:
        return baselines
    dense_row, sparse_row = row_name(dense.checkpoint.provenance), row_name(sparse.checkpoint.provenance)
    return {
        f"{dense_row}, FP16": dense.floats.fp16,
        f"{dense_row}, INT8": dense.int8.models.fp32,
        **baselines,
        sparse_row: sparse.floats.fp32,
        f"{sparse_row}, FP16": sparse.floats.fp16,
    }


def row_name(provenance: Provenance, precision: OnnxPrecision = FP32) -> str:
    """What the table of accuracies calls a model."""
    permuted = ", permuted" if provenance.permutation else ""
    recalibrated = ", recalibrated" if provenance.recalibrated_images else ""
    synthetic = ", synthetic images" if synthetic_count(provenance.image_sets) else ""
    quantized = ", INT8" if precision == INT8 else ""
    return f"{provenance.method or 'dense'}{permuted}{recalibrated}{synthetic}{quantized}"
