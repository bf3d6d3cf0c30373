"""Each stage with the digests and options that decide whether it has to run again. The order is `run.py`'s."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from maskplan.calibration.calibrate import CalibrationImages, calibrate
from maskplan.exporters.conformance import CheckOptions, check_2to4
from maskplan.exporters.onnx_export import export_onnx
from maskplan.pipeline.core.artifacts import Checkpoint, ImageSet, MaskSet, OnnxModel, Provenance
from maskplan.pipeline.core.choices import FP16, FP32, INT8, MAGNITUDE
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import read_bytes, sha256_of, write_atomically
from maskplan.pipeline.core.reports import CalibrationReport, ConformanceReport
from maskplan.pipeline.data.dataset import Dataset, ImageFiles, identify, listing_sha256, require_disjoint
from maskplan.pipeline.learning.options import LearnFiles
from maskplan.pipeline.masking.maskset import leave_out
from maskplan.pipeline.masking.patterns import parse_pattern
from maskplan.pipeline.models.batchnorm import recalibrate
from maskplan.pipeline.models.checkpoint import ModelOptions, load_checkpoint, module_of, weights_file
from maskplan.pipeline.models.registry import model_identity
from maskplan.pipeline.permutation.record import Permuted
from maskplan.pipeline.pruning.bake import bake
from maskplan.pipeline.pruning.mask import choose_masks, given_masks, looks_at_images, policy_of
from maskplan.pipeline.recipe import Recipe
from maskplan.pipeline.stages.refine import RAN_DENSE
from maskplan.pipeline.stages.workspace import Workspace

log = logging.getLogger(__name__)

_STATE, _LOG = "learning.safetensors", "learning"


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
class Quantized:
    """One model in INT8: beside FP32, for ONNX Runtime, and beside FP16, for TensorRT."""

    models: Exported
    report: CalibrationReport


@dataclass(frozen=True)
class Reordered:
    """Channels in a better order, or why they are as they were."""

    permuted: Permuted | None
    reason: str | None


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


def permute(job: Job, dense: Checkpoint, method: str) -> Reordered:
    """`permuted.safetensors`: the same function, whose masks keep more; a model that cannot be read off goes on as it is."""
    policy, mask = policy_of(job.recipe.mask, method), job.recipe.mask

    def work() -> Reordered:
        from maskplan.pipeline.permutation.groups import UnexportableError
        from maskplan.pipeline.permutation.permute import permute as permute_stage

        module, made = module_of(job.model, dense), dense.provenance
        files = job.ws.path("permuted.safetensors"), job.ws.path("permutation.safetensors")
        try:
            done = permute_stage(module, made, parse_pattern(mask.pattern), policy, job.recipe.permute, *files)
        except UnexportableError as error:
            log.warning("%s; it goes on unpermuted", error.what)
            return Reordered(None, f"{error.what}: {error.found}")
        return Reordered(done, None)

    inputs = {
        "checkpoint": dense.sha256,
        "pattern": mask.pattern,
        "policy": policy,
        "options": job.recipe.permute,
    }
    return job.ws.stage("permute", Reordered, inputs, work)


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
    looks = looks_at_images(options, how)
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


def check(job: Job, exported: Exported, pattern: str, name: str = "check") -> Checked:
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
    return job.ws.stage(name, Checked, inputs, lambda: Checked(one(exported.fp32), one(exported.fp16)))


def quantize(job: Job, exported: Exported, name: str, images: Images | None) -> Quantized:
    """`NAME.int8.onnx` and `NAME.int8.fp16.onnx`, and `NAME.ranges.json` for readers: INT8 beside FP32 and beside FP16.

    Raises:
        InputError: There are no images to calibrate on.
    """
    if images is None:
        raise InputError("INT8 needs images to calibrate on", fix="give --data DIR with train/ and val/")
    options = job.recipe.calibrate
    paths = {rest: job.ws.path(f"{name}.int8{part}.onnx") for rest, part in ((FP32, ""), (FP16, ".fp16"))}
    made = exported.fp32.provenance
    assert made is not None  # our own export

    def work() -> Quantized:
        source = CalibrationImages(images.data.train, images.data.select, made.preprocessing)
        ranges = job.ws.path(f"{name}.ranges.json")
        # It is written anew: that of other inputs or options would be refused.
        ranges.unlink(missing_ok=True)
        done = calibrate(exported.fp32, source, options, paths, ranges)
        return Quantized(Exported(*done.models), done.report)

    inputs = {
        "onnx": exported.fp32.sha256,
        "images": [s.sha256 for s in images.sets.shaping],
        "options": options,
    }
    return job.ws.stage(f"calibrate-{name}", Quantized, inputs, work)


def baselines(job: Job, dense: Checkpoint, masks: MaskSet, images: Images | None) -> dict[str, OnnxModel]:
    """Magnitude masks on the same layers, without and with recalibration, to stand beside the chosen ones.

    They are for the channels as the model has them, so that what a permutation gains shows too.
    """
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
        if used is not None and masks.method == MAGNITUDE and masks.permutation is None:
            continue
        checkpoint = prune(job, dense, magnitude, name, job.ws.hidden(f"{name}.safetensors"), used)
        row = row_of(checkpoint.provenance)
        # Without BatchNorm there is nothing to recalibrate, and one row is enough.
        if row not in found:
            found[row] = export_aside(job, checkpoint, name)
    return found


def beside_int8(
    dense: Exported, dense_int8: Quantized, sparse: Exported, others: Mapping[str, OnnxModel]
) -> dict[str, OnnxModel]:
    """What stands in the table beside the untouched dense model and the sparse one in INT8: both in every precision."""
    rows = [row_of(made) for made in (dense.fp32.provenance, sparse.fp32.provenance) if made is not None]
    return {
        f"{rows[0]}, FP16": dense.fp16,
        f"{rows[0]}, INT8": dense_int8.models.fp32,
        **others,
        rows[1]: sparse.fp32,
        f"{rows[1]}, FP16": sparse.fp16,
    }


def row_of(made: Provenance, precision: str = "fp32") -> str:
    """What the table of methods calls a model."""
    permuted = ", permuted" if made.permutation else ""
    recalibrated = ", recalibrated" if made.recalibrated_images else ""
    quantized = ", INT8" if precision == INT8 else ""
    return f"{made.method or 'dense'}{permuted}{recalibrated}{quantized}"


def export_aside(job: Job, checkpoint: Checkpoint, name: str) -> OnnxModel:
    """An ONNX file in FP32 that stands beside the line's own."""
    paths = {"fp32": job.ws.hidden(f"{name}.onnx")}
    return job.ws.stage(
        f"export-{name}",
        OnnxModel,
        {"checkpoint": checkpoint.sha256, "options": job.recipe.export},
        lambda: export_onnx(module_of(job.model, checkpoint), checkpoint.provenance, job.recipe.export, paths)[0],
    )
