"""The calibrate stage: from an FP32 ONNX file to INT8 with explicit Q/DQ; pruned weights stay exactly zero."""

from __future__ import annotations

import glob
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from maskplan.calibration.activations import collect_histograms
from maskplan.calibration.batches import calibration_batches, choose_images
from maskplan.calibration.cache import CacheKey, read_cache, write_cache
from maskplan.calibration.histogram import union
from maskplan.calibration.layers import CalibratedLayer, list_layers
from maskplan.calibration.output_layers import output_layers
from maskplan.calibration.placement import MIN_OPSET, Placement, PlaceOptions, place, require_unquantized
from maskplan.calibration.qdq import insert_qdq
from maskplan.calibration.ranges import RangeMethod, RangeOptions, Ranges, amax_of
from maskplan.calibration.sensitivity import BudgetSelection, placements_of, select_by_budget
from maskplan.exporters.computed_weights import store_weights
from maskplan.exporters.external_data import load_external_data
from maskplan.exporters.half_range import outside_fp16
from maskplan.exporters.metadata import describe_onnx, load_onnx, opset_of, read_provenance, write_provenance
from maskplan.exporters.opset import raise_opset, require_same_outputs
from maskplan.exporters.precision import FP16_SCALES_OPSET, to_fp16
from maskplan.exporters.run_shapes import baked_batch, set_shapes
from maskplan.pipeline.core.artifacts import ImageSet, OnnxModel, OutputKind, Preprocessing, merge_image_sets
from maskplan.pipeline.core.choices import FP16, FP32
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import write_atomically
from maskplan.pipeline.core.output_kinds import guess_kinds
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.core.reports import CalibrationReport
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.data.dataset import Split, batches
from maskplan.pipeline.data.image_sets import identify
from maskplan.pipeline.data.samples import ImageSamples, Samples, TensorSamples

log = logging.getLogger(__name__)

# Memory for the images of `select` on which a budget is measured.
_MAX_SELECT_BYTES = 512 * 2**20


@dataclass(frozen=True)
class CalibrateOptions:
    """How a model is quantized.

    Attributes:
        images: Number of training images on which ranges are measured.
        batch: Images per batch.
        method: As in `RangeOptions`.
        percentile: As in `RangeOptions`.
        exclude: Patterns (globs) of names of nodes or weights that stay in higher precision.
        keep_fp32: Patterns (globs) of names of nodes or tensors that stay FP32 where the layers that are not quantized
            are FP16.
        quantize_heads: Also quantize the last layers before outputs that hold values, such as boxes.
        quantize_outputs: Also quantize the outputs of layers, to allow kernels with INT8 inputs and outputs.
        max_drop: Points of top-1 on `select` that quantization may cost; the most sensitive layers stay in higher precision
            until this holds. None quantizes all layers.
        seed: Of the draw of images.
    """

    images: int = 512
    batch: int = 16
    method: RangeMethod = RangeOptions.method
    percentile: float = RangeOptions.percentile
    exclude: tuple[str, ...] = ()
    keep_fp32: tuple[str, ...] = ()
    quantize_outputs: bool = False
    quantize_heads: bool = False
    max_drop: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, images=self.images, batch=self.batch)
        at_least(-100, max_drop=self.max_drop)
        self.ranges  # noqa: B018  (creating the record checks its bounds)

    @property
    def ranges(self) -> RangeOptions:
        return RangeOptions(self.method, self.percentile)

    @property
    def place(self) -> PlaceOptions:
        return PlaceOptions(self.exclude, self.quantize_outputs)


@dataclass(frozen=True)
class CalibrationImages:
    """Images to measure ranges on (`train`), images to measure a budget on (`select`), and the preprocessing of both."""

    train: Split
    select: Split | None
    preprocessing: Preprocessing


@dataclass(frozen=True)
class CalibrationSamples:
    """Samples to measure ranges on, for a network of any kind."""

    train: Samples


@dataclass(frozen=True)
class Calibrated:
    """The result of calibration.

    Attributes:
        models: The files written, in the order of the given paths.
        amax: Ranges of the quantized activations.
        report: For the line's report.
        layers: Every layer of the model, with its type and why it is not INT8.
    """

    models: tuple[OnnxModel, ...]
    amax: Mapping[str, float]
    report: CalibrationReport
    layers: tuple[CalibratedLayer, ...] = ()


def calibrate(
    onnx_model: OnnxModel,
    source: CalibrationImages | CalibrationSamples | Mapping[str, float],
    options: CalibrateOptions,
    paths: Mapping[str, Path],
    cache: Path | None = None,
    kinds: Sequence[OutputKind] = (),
) -> Calibrated:
    """Write INT8 models.

    Weights that are computed from stored tensors, or stored in another layout or type, are stored as their operator reads
    them first, and local functions are inlined. An opset that is too old for Q/DQ is raised by ONNX's own converter.

    Args:
        onnx_model: An FP32 graph of any tool.
        source: Images, samples of a network of any kind, or imported ranges by tensor name.
        options: How to quantize.
        paths: The files to write, by the type of everything that is not INT8: `fp32` for ONNX Runtime, `fp16` for TensorRT.
        cache: Range cache of an earlier run, which is read first; written if it does not exist.
        kinds: What the outputs hold, for the heads that stay in floating point; empty takes the record's, else guesses.

    Raises:
        InputError: No images, activations that are not finite, a model that is already quantized or whose opset cannot
            be raised, a cache of another model, missing ranges, or a budget that does not hold.
    """
    model = load_onnx(onnx_model.path)
    load_external_data(model, onnx_model.path.parent, where=onnx_model.path)
    require_unquantized(model)
    model = _with_opset(model, source, options, FP16_SCALES_OPSET if FP16 in paths else MIN_OPSET, onnx_model.path)
    if (found := baked_batch(onnx_model, model)) is not None:
        set_shapes(model, found.inputs, found.outputs)
    store_weights(model, None)
    placement = _without_heads(model, onnx_model, options, kinds)
    select = _budget_images(source, options)
    image_sets: list[ImageSet] = []
    selection = None
    if isinstance(source, CalibrationImages | CalibrationSamples):
        measured_on, identity = _feeds(source, options)
        image_sets.append(measured_on)
        key = CacheKey(onnx_model.sha256, identity, options.ranges)
        tensors = _tensors_to_measure(model, placement, options)
        where = onnx_model.path
        ranges, origin = _ranges(model, tensors, placement, source, options, key, cache, where)
        if isinstance(source, CalibrationImages) and select is not None and options.max_drop is not None:
            parts = zip(*batches(select, source.preprocessing, options.batch), strict=True)
            images, labels = (np.concatenate(part) for part in parts)
            selection = select_by_budget(model, options.place, ranges.amax, options.max_drop, images, labels)
            placement = _place_by_budget(model, selection)
            image_sets.append(identify(select))
    else:
        ranges, origin = Ranges(source, {}), "imported"
    quantized = insert_qdq(model, placement, ranges.amax)
    if (provenance := read_provenance(model, onnx_model.path)) is not None:
        all_sets = merge_image_sets(provenance.image_sets, image_sets)
        write_provenance(quantized, replace(provenance, image_sets=all_sets))
    layers = list_layers(model, placement, next(iter(paths)) if len(paths) == 1 else FP32)
    report = CalibrationReport(
        method=options.method,
        images=image_sets[0].images if image_sets else 0,
        ranges_from=origin,
        quantized_layers=len(placement.weights),
        in_float=tuple((layer.node, layer.reason) for layer in layers if layer.reason is not None),
        select_drop=None if selection is None else selection.drop,
        select_images=0 if selection is None else selection.images,
    )
    # Convert all models before writing the first: an error leaves no file.
    protos = [_with_float_type(quantized, precision, ranges, options.keep_fp32) for precision in paths]
    models = tuple(_write(proto, path) for proto, path in zip(protos, paths.values(), strict=True))
    return Calibrated(models, {a.tensor: ranges.amax[a.tensor] for a in placement.activations}, report, layers)


def _without_heads(
    model: onnx.ModelProto, onnx_model: OnnxModel, options: CalibrateOptions, kinds: Sequence[OutputKind]
) -> Placement:
    """The placement, without the last layers before outputs of values unless these are to be quantized as well."""
    placement = place(model, options.place)
    provenance = onnx_model.provenance
    is_classifier = provenance is not None and not provenance.outputs
    if options.quantize_heads or (is_classifier and not kinds):
        return placement
    recorded = provenance.outputs if provenance is not None else ()
    known = kinds or recorded or guess_kinds(onnx_model.inputs, onnx_model.outputs)
    heads = output_layers(model, placement, known)
    if not heads:
        return placement
    exclude = (*options.exclude, *map(glob.escape, heads))
    placement = place(model, replace(options.place, exclude=exclude))
    return replace(placement, in_float=tuple((name, heads.get(name, why)) for name, why in placement.in_float))


def _tensors_to_measure(model: onnx.ModelProto, placement: Placement, options: CalibrateOptions) -> list[str]:
    """Tensors to measure: with a budget, also those that are quantized only if some layers are not."""
    placements = [placement] if options.max_drop is None else placements_of(model, options.place)
    return list(dict.fromkeys(a.tensor for p in (placement, *placements) for a in p.activations))


def _ranges(
    model: onnx.ModelProto,
    tensors: list[str],
    placement: Placement,
    source: CalibrationImages | CalibrationSamples,
    options: CalibrateOptions,
    key: CacheKey,
    cache: Path | None,
    where: Path,
) -> tuple[Ranges, str]:
    """Ranges, and their origin for the report: from the cache if it has all tensors, else measured."""
    if cache is not None and cache.is_file():
        known = read_cache(cache, key)
        if not set(tensors) - known.amax.keys():
            return known, "cache"
        log.info("%s lacks tensors that these options need: measuring the ranges again", cache)
    if isinstance(source, CalibrationImages):
        images = choose_images(source.train, options.images, options.seed)
        histograms = collect_histograms(
            model, tensors, calibration_batches(images, source.preprocessing, options.batch), where=where
        )
    else:
        samples = source.train.sample(options.images, options.seed)
        whole = isinstance(samples, TensorSamples) and samples.one_run_each
        feeds = track(samples.batches(options.batch), "calibrate", -(-len(samples) // (1 if whole else options.batch)))
        histograms = collect_histograms(model, tensors, feeds, where=where, whole=whole)
    amax = {name: amax_of(histogram, options.ranges) for name, histogram in histograms.items()}
    for group in placement.tied:
        amax |= dict.fromkeys(group, amax_of(union(histograms[name] for name in group), options.ranges))
    ranges = Ranges(amax, {name: histogram.amax for name, histogram in histograms.items()})
    if cache is not None:
        write_cache(cache, key, ranges)
    return ranges, "images"


def _feeds(source: CalibrationImages | CalibrationSamples, options: CalibrateOptions) -> tuple[ImageSet, str]:
    """The images that ranges are measured on, and what identifies them in a cache."""
    if isinstance(source, CalibrationImages):
        images = identify(choose_images(source.train, options.images, options.seed))
        return images, f"{images.sha256} {source.preprocessing}"
    samples = source.train.sample(options.images, options.seed)
    found = samples.identify()
    preprocessing = samples.preprocessing if isinstance(samples, ImageSamples) else ""
    return found, f"{found.sha256} {preprocessing}"


def _budget_images(
    source: CalibrationImages | CalibrationSamples | Mapping[str, float], options: CalibrateOptions
) -> Split | None:
    """The images of `select` on which a budget is measured, few enough for memory; None without a budget."""
    if options.max_drop is None:
        return None
    if isinstance(source, CalibrationSamples):
        raise InputError(
            "a budget in points of top-1 needs a classifier of images",
            found="a network of another kind",
            fix="omit --max-drop; `maskplan compare` measures what INT8 costs, and --exclude keeps layers in float",
        )
    if not isinstance(source, CalibrationImages) or source.select is None or not len(source.select):
        raise InputError(
            "a budget needs labeled images to measure accuracy",
            found="no images in `select`"
            if isinstance(source, CalibrationImages)
            else "imported ranges, without images",
            fix="give --data with two images or more of some class in train/, or omit --max-drop",
        )
    size = source.preprocessing
    max_images = max(1, _MAX_SELECT_BYTES // (4 * size.channels * size.height * size.width))
    return source.select.sample(max_images, options.seed)


def _with_opset(
    model: onnx.ModelProto,
    source: CalibrationImages | CalibrationSamples | Mapping[str, float],
    options: CalibrateOptions,
    needed: int,
    where: Path,
) -> onnx.ModelProto:
    """The model with an opset that has the operators of Q/DQ, checked on one sample."""
    if opset_of(model) >= needed:
        return model
    raised = raise_opset(model, needed, where)
    if isinstance(source, CalibrationImages):
        image = choose_images(source.train, 1, options.seed)
        ((pixels, _),) = batches(image, source.preprocessing, 1)
        size = next((v.type.tensor_type.shape.dim[0].dim_value for v in model.graph.input[:1]), 1) or 1
        require_same_outputs(model, raised, {model.graph.input[0].name: np.repeat(pixels, size, axis=0)}, where)
    elif isinstance(source, CalibrationSamples):
        require_same_outputs(model, raised, next(iter(source.train.batches(1))), where)
    return raised


def _place_by_budget(model: onnx.ModelProto, selection: BudgetSelection) -> Placement:
    """The placement that keeps the budget; for layers that the budget excludes, the reasons say so."""
    placement = place(model, selection.options)
    reasons = dict.fromkeys(selection.layers, "among the most sensitive layers, excluded to keep the budget")
    return replace(placement, in_float=tuple((name, reasons.get(name, why)) for name, why in placement.in_float))


def _with_float_type(
    quantized: onnx.ModelProto, precision: str, ranges: Ranges, keep_fp32: tuple[str, ...]
) -> onnx.ModelProto:
    """The model with everything that is not INT8 in one float type."""
    return quantized if precision == FP32 else to_fp16(quantized, _outside_fp16(quantized, ranges), keep_fp32)


def _write(model: onnx.ModelProto, path: Path) -> OnnxModel:
    write_atomically(path, model.SerializeToString())
    return describe_onnx(path, model)


def _outside_fp16(quantized: onnx.ModelProto, ranges: Ranges) -> Mapping[str, float]:
    outside = outside_fp16(quantized, ranges.largest)
    if outside:
        tensors = ", ".join(f"{name} up to {largest:.4g}" for name, largest in outside.items())
        log.warning("these activations stay FP32, because FP16 is too narrow for them: %s", tensors)
    return outside
