"""The calibrate stage: an FP32 ONNX file to INT8 with explicit Q/DQ, its pruned weights still exactly zero."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from maskplan.calibration.activations import collect
from maskplan.calibration.batches import calibration_batches, choose_images
from maskplan.calibration.cache import CacheKey, read_cache, write_cache
from maskplan.calibration.graph import STANDARD
from maskplan.calibration.histogram import union
from maskplan.calibration.placement import Placement, PlaceOptions, place
from maskplan.calibration.qdq import insert_qdq
from maskplan.calibration.ranges import RangeOptions, Ranges, amax_of
from maskplan.calibration.sensitivity import Kept, hold_budget, placements_of
from maskplan.exporters.external_data import load_external_data
from maskplan.exporters.half_range import fp16_overflows
from maskplan.exporters.metadata import describe_onnx, load_onnx, read_provenance, write_provenance
from maskplan.exporters.precision import to_fp16
from maskplan.pipeline.core.artifacts import ImageSet, OnnxModel, Preprocessing
from maskplan.pipeline.core.choices import FP16, FP32
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import write_atomically
from maskplan.pipeline.core.reports import CalibrationReport
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.data.dataset import Split, batches, identify

log = logging.getLogger(__name__)

FP16_SCALES_OPSET = 19
"""The first opset whose Q/DQ take FP16 scales."""

# Images of `select` that a budget is held on lie in memory, in at most so many bytes.
_KEEP_BYTES = 512 * 2**20


@dataclass(frozen=True)
class CalibrateOptions:
    """How a model is quantized.

    Attributes:
        images: Training images that ranges are measured on.
        batch: Images a batch.
        method: How ranges follow from what was measured: `minmax`, `percentile`, `entropy` or `mse`. Entropy, TensorRT's
            own way, cost CIFAR-10 networks points that the others did not (docs/results.md).
        percentile: For that method, in percent.
        exclude: Patterns of names of nodes or weights that stay in higher precision.
        quantize_outputs: Quantize also what layers hand on, so that INT8-in/INT8-out kernels can be chosen.
        max_drop: Points of top-1 on `select` that quantizing may cost; the layers that cost most stay in higher precision
            until it holds. None quantizes all.
        seed: For the draw of images.
    """

    images: int = 512
    batch: int = 16
    method: str = "mse"
    percentile: float = 99.99
    exclude: tuple[str, ...] = ()
    quantize_outputs: bool = False
    max_drop: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, images=self.images, batch=self.batch)
        at_least(-100, max_drop=self.max_drop)
        self.ranges  # noqa: B018  (their own bounds)

    @property
    def ranges(self) -> RangeOptions:
        return RangeOptions(self.method, self.percentile)

    @property
    def place(self) -> PlaceOptions:
        return PlaceOptions(self.exclude, self.quantize_outputs)


@dataclass(frozen=True)
class CalibrationImages:
    """Images to measure ranges on, images to choose layers by, and how both are prepared."""

    train: Split
    select: Split | None
    preprocessing: Preprocessing


@dataclass(frozen=True)
class Calibrated:
    """What calibration wrote, in the order of the paths asked for, by which ranges, and what it came to."""

    models: tuple[OnnxModel, ...]
    amax: Mapping[str, float]
    report: CalibrationReport


def calibrate(
    onnx_model: OnnxModel,
    source: CalibrationImages | Mapping[str, float],
    options: CalibrateOptions,
    paths: Mapping[str, Path],
    cache: Path | None = None,
) -> Calibrated:
    """Write INT8 models.

    Args:
        onnx_model: An FP32 graph, ours or another tool's.
        source: Images, or ranges from elsewhere by the graph's own tensor names.
        options: How to quantize.
        paths: Where to write, by the type of what stays in floats: `fp32` for ONNX Runtime, `fp16` for TensorRT.
        cache: Ranges of an earlier run, consulted first; written where there are none yet.

    Raises:
        InputError: No images, activations that are not finite, a model that is quantized already or too old, a cache of
            another model, ranges missing, or a budget that does not hold.
    """
    model = load_onnx(onnx_model.path)
    load_external_data(model, onnx_model.path.parent, where=onnx_model.path)
    placement = place(model, options.place)
    select = _held_on(source, options)
    if FP16 in paths:
        _require_fp16_scales(model)
    shaped: list[ImageSet] = []
    kept = None
    if isinstance(source, CalibrationImages):
        chosen = choose_images(source.train, options.images, options.seed)
        shaped.append(identify(chosen))
        key = CacheKey(onnx_model.sha256, f"{shaped[0].sha256} {source.preprocessing}", options.ranges)
        tensors = _tensors(model, placement, options)
        where = onnx_model.path
        ranges, origin = _ranges(model, tensors, placement, chosen, source.preprocessing, options, key, cache, where)
        if select is not None and options.max_drop is not None:
            parts = zip(*batches(select, source.preprocessing, options.batch), strict=True)
            images, labels = (np.concatenate(part) for part in parts)
            kept = hold_budget(model, options.place, ranges.amax, options.max_drop, images, labels)
            placement = _placed_as(model, kept)
            shaped.append(identify(select))
    else:
        ranges, origin = Ranges(source, {}), "imported"
    quantized = insert_qdq(model, placement, ranges.amax)
    if (made := read_provenance(model, onnx_model.path)) is not None:
        write_provenance(quantized, replace(made, image_sets=tuple(dict.fromkeys((*made.image_sets, *shaped)))))
    report = CalibrationReport(
        method=options.method,
        images=shaped[0].images if shaped else 0,
        ranges_from=origin,
        quantized_layers=len(placement.weights),
        in_float=placement.in_float,
        select_drop=None if kept is None else kept.drop,
        select_images=0 if kept is None else kept.images,
    )
    # All are made before one is written.
    protos = [_beside(quantized, rest, ranges) for rest in paths]
    models = tuple(_write(proto, path) for proto, path in zip(protos, paths.values(), strict=True))
    return Calibrated(models, {a.tensor: ranges.amax[a.tensor] for a in placement.activations}, report)


def _tensors(model: onnx.ModelProto, placement: Placement, options: CalibrateOptions) -> list[str]:
    """What to measure: with a budget, also what only a placement without some layers quantizes."""
    placements = [placement] if options.max_drop is None else placements_of(model, options.place)
    return list(dict.fromkeys(a.tensor for p in (placement, *placements) for a in p.activations))


def _ranges(
    model: onnx.ModelProto,
    tensors: list[str],
    placement: Placement,
    chosen: Split,
    preprocessing: Preprocessing,
    options: CalibrateOptions,
    key: CacheKey,
    cache: Path | None,
    where: Path,
) -> tuple[Ranges, str]:
    if cache is not None and cache.is_file():
        known = read_cache(cache, key)
        if not set(tensors) - known.amax.keys():
            return known, "cache"
        log.info("%s lacks tensors of these options: measured again", cache)
    found = collect(model, tensors, calibration_batches(chosen, preprocessing, options.batch), where=where)
    amax = {name: amax_of(histogram, options.ranges) for name, histogram in found.items()}
    for group in placement.tied:
        amax |= dict.fromkeys(group, amax_of(union(found[name] for name in group), options.ranges))
    ranges = Ranges(amax, {name: histogram.amax for name, histogram in found.items()})
    if cache is not None:
        write_cache(cache, key, ranges)
    return ranges, "images"


def _held_on(source: CalibrationImages | Mapping[str, float], options: CalibrateOptions) -> Split | None:
    """The images of `select` that a budget is held on, few enough for memory; None where there is no budget."""
    if options.max_drop is None:
        return None
    given = isinstance(source, CalibrationImages)
    if not isinstance(source, CalibrationImages) or source.select is None or not len(source.select):
        raise InputError(
            "a budget needs labeled images to be held on",
            found="none are set aside" if given else "ranges from elsewhere, without images",
            fix="give --data with two images or more of some class in train/, or leave --max-drop out",
        )
    how = source.preprocessing
    most = max(1, _KEEP_BYTES // (4 * how.channels * how.height * how.width))
    return source.select.sample(most, options.seed)


def _require_fp16_scales(model: onnx.ModelProto) -> None:
    # Told before images are run, not after.
    opset = next((o.version for o in model.opset_import if o.domain in STANDARD), 0)
    if opset < FP16_SCALES_OPSET:
        raise InputError(
            "the model's opset is too old for FP16 beside INT8",
            found=f"opset {opset}",
            fix=f"export it again with opset {FP16_SCALES_OPSET} or later, or choose FP32 for the rest",
        )


def _placed_as(model: onnx.ModelProto, kept: Kept) -> Placement:
    """The placement that holds the budget; its reasons do not blame the user's patterns for what the budget left."""
    placement = place(model, kept.options)
    reasons = dict.fromkeys(kept.layers, "left for the budget, being the most sensitive")
    return replace(placement, in_float=tuple((name, reasons.get(name, why)) for name, why in placement.in_float))


def _beside(quantized: onnx.ModelProto, rest: str, ranges: Ranges) -> onnx.ModelProto:
    """The model with what is not INT8 in one type of floats."""
    return quantized if rest == FP32 else to_fp16(quantized, _overflowing(quantized, ranges))


def _write(model: onnx.ModelProto, path: Path) -> OnnxModel:
    write_atomically(path, model.SerializeToString())
    return describe_onnx(path, model)


def _overflowing(quantized: onnx.ModelProto, ranges: Ranges) -> Mapping[str, float]:
    found = fp16_overflows(quantized, ranges.largest)
    if found:
        told = ", ".join(f"{name} up to {largest:.4g}" for name, largest in found.items())
        log.warning("FP16 beside INT8: kept in FP32, for they come near 65504 or exceed it: %s", told)
    return found
