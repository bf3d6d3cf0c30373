"""The stages of a run that starts from an ONNX file: copy, prune, FP16, INT8, check, compare and time."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from maskplan.calibration.calibrate import CalibrationSamples
from maskplan.calibration.calibrate import calibrate as calibrate_onnx
from maskplan.engines.build import profiles_for
from maskplan.exporters.computed_weights import store_computed_weights
from maskplan.exporters.conformance import CheckOptions, require_2to4
from maskplan.exporters.convert_precision import ConvertOptions, convert_precision
from maskplan.exporters.external_data import external_tensors, load_external_data, locate_external
from maskplan.exporters.metadata import describe_onnx, load_onnx
from maskplan.exporters.prune import prune_onnx
from maskplan.exporters.tensors import native_values
from maskplan.exporters.weights import weight_uses
from maskplan.pipeline.core.artifacts import (
    DenseLayer,
    ImageSet,
    MaskedLayer,
    MaskSet,
    OnnxModel,
    OutputKind,
    Pattern,
    Preprocessing,
    Profile,
    Provenance,
    ShapeRange,
    TensorSpec,
)
from maskplan.pipeline.core.choices import CHANNEL, CONFORMING, FP32, LAYERWISE, FloatPrecision, MaskMethod
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import sha256_of, write_atomically
from maskplan.pipeline.core.image_shape import image_shape
from maskplan.pipeline.core.output_kinds import guess_kinds, parse_kinds
from maskplan.pipeline.core.reports import CalibrationReport, ConformanceReport, ParityReport, WeightVerdict
from maskplan.pipeline.data.image_sets import require_disjoint
from maskplan.pipeline.data.samples import ImageOptions, ImageSamples, Samples, open_samples
from maskplan.pipeline.masking.magnitude import keep_largest
from maskplan.pipeline.masking.patterns import parse_pattern
from maskplan.pipeline.masking.policy import TOO_COSTLY
from maskplan.pipeline.parity.compare_files import compare_files
from maskplan.pipeline.parity.compare_networks import NetworkOptions
from maskplan.pipeline.pruning.prune_layerwise import LayerwiseOptions, prune_layerwise
from maskplan.pipeline.stages.compare import metric_key
from maskplan.pipeline.stages.engines import Engines, engine_identity
from maskplan.pipeline.stages.job import Job


@dataclass(frozen=True)
class Source:
    """An ONNX file and its data.

    Attributes:
        path: The file.
        data: Images or arrays; None prunes by magnitude and compares on noise.
        images: How image files become an input.
        outputs: Kinds of outputs, where the guess is wrong.
        metric: The user's metric, or None.
        update: Refit kept weights, with layer-wise masks.
    """

    path: Path
    data: Path | None
    images: ImageOptions
    outputs: tuple[str, ...] = ()
    metric: str | None = None
    update: bool = False

    def samples(self, role: str, inputs: Sequence[TensorSpec]) -> Samples | None:
        """The samples of one part of the data; None without data."""
        if self.data is None:
            return None
        return open_samples(self.data, role, inputs, self.images, self.path.name)

    @property
    def network_options(self) -> NetworkOptions:
        """What the comparison is told."""
        return NetworkOptions(self.data, self.outputs, self.metric, self.images)


@dataclass(frozen=True)
class PrunedFile:
    """The pruned file and what was done to each weight; `kept_dense` are those of `keep_dense_budget`."""

    onnx: OnnxModel
    left_dense: tuple[tuple[str, str], ...]
    by_magnitude: tuple[tuple[str, str], ...]
    kept_dense: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuantizedFile:
    """The INT8 file, and the report of its calibration."""

    onnx: OnnxModel
    report: CalibrationReport


def copy_source(job: Job, source: Source) -> OnnxModel:
    """Write `dense.onnx`: the file with its external data in it."""
    out = job.ws.path("dense.onnx")

    def work() -> OnnxModel:
        model = load_onnx(source.path)
        load_external_data(model, source.path.parent, where=source.path)
        if (precision := describe_onnx(source.path, model).precision) != FP32:
            fix = "give the FP32 file; the line makes FP16 and INT8 files from it"
            raise InputError("the line starts from an FP32 file", where=source.path, found=precision, fix=fix)
        write_atomically(out, model.SerializeToString())
        return describe_onnx(out)

    return job.ws.stage("export-dense", OnnxModel, {"onnx": onnx_digest(source.path)}, work)


def onnx_digest(path: Path) -> list[str]:
    """Digests of an ONNX file and of the files of its external data.

    Raises:
        InputError: Not an ONNX file, or its data is missing.
    """
    model = load_onnx(path)
    files = {locate_external(tensor, path.parent)[0] for tensor in external_tensors(model)}
    return [sha256_of(path), *(sha256_of(file) for file in sorted(files))]


def identify_samples(source: Source, dense: OnnxModel, *, shapes_network: bool) -> dict[str, ImageSet]:
    """Digests of the samples that shape the network (`train`), if any do, and of those that it is compared on (`val`).

    Raises:
        InputError: They share samples.
    """
    roles = ("train", "val") if shapes_network else ("val",)
    found = {role: source.samples(role, dense.inputs) for role in roles}
    sets = {role: samples.identify() for role, samples in found.items() if samples is not None}
    if len(sets) == len(("train", "val")):
        try:
            require_disjoint(sets["val"], [sets["train"]])
        except InputError as error:
            fix = "give a folder with train/ and val/, or train.npz and val.npz, that share none"
            raise InputError(error.what, where=source.data, found=error.found, fix=fix) from error
    return sets


def prune(job: Job, source: Source, dense: OnnxModel, method: MaskMethod, sets: dict[str, ImageSet]) -> PrunedFile:
    """Write `sparse.onnx`."""
    out, pattern = job.ws.path("sparse.onnx"), job.recipe.mask.pattern
    options = LayerwiseOptions(
        pattern=pattern,
        update=source.update,
        seed=job.model.seed,
        keep_dense_budget=job.recipe.mask.keep_dense_budget,
    )

    def work() -> PrunedFile:
        samples = source.samples("train", dense.inputs)
        if method == LAYERWISE and samples is not None:
            kinds = _kinds(source, dense)
            layerwise = prune_layerwise(dense.path, out, dense.inputs, samples, options, kinds)
            left_dense = (*layerwise.pruned.left_dense, *((name, TOO_COSTLY) for name in layerwise.kept_dense))
            return PrunedFile(describe_onnx(out), left_dense, layerwise.by_magnitude, layerwise.kept_dense)
        pruned = prune_onnx(dense.path, out, parse_pattern(pattern))
        return PrunedFile(describe_onnx(out), pruned.left_dense, ())

    inputs = {
        "onnx": dense.sha256,
        "method": method,
        "options": options,
        "train": sets["train"].key if method == LAYERWISE else None,
        "outputs": source.outputs if options.keep_dense_budget else (),
        "images": source.images if method == LAYERWISE else None,
    }
    return job.ws.stage("prune", PrunedFile, inputs, work)


def _kinds(source: Source, model: OnnxModel) -> tuple[OutputKind, ...]:
    """The kinds of a file's outputs: given, else recorded, else guessed."""
    recorded = model.provenance.outputs if model.provenance is not None else ()
    return parse_kinds(source.outputs, recorded or guess_kinds(model.inputs, model.outputs), source.path.name)


def to_fp16(job: Job, source: Source, model: OnnxModel, name: str) -> OnnxModel:
    """Write `NAME.fp16.onnx`.

    Raises:
        InputError: The outputs of the FP16 file differ too much.
    """
    out = job.ws.path(f"{name}.fp16.onnx")
    shapes = sample_shapes(source, model)
    options = ConvertOptions(seed=job.model.seed, shapes=shapes)

    def work() -> OnnxModel:
        result = convert_precision(model.path, out, options)
        if not result.passed:
            fix = "choose --precision fp32, or convert it with `maskplan convert-precision --keep-fp32 PATTERN`"
            raise InputError("FP16 changes the outputs too much", where=name, found="; ".join(result.problems), fix=fix)
        return describe_onnx(out)

    return job.ws.stage(f"export-{name}-fp16", OnnxModel, {"onnx": model.sha256, "options": options}, work)


def calibrate(
    job: Job, source: Source, model: OnnxModel, name: str, precision: FloatPrecision, sets: dict[str, ImageSet]
) -> QuantizedFile:
    """Write `NAME.int8.onnx`, what is not INT8 in `precision`."""
    out, options = job.ws.path(f"{name}.int8.onnx"), job.recipe.calibrate
    kinds = _kinds(source, model)

    def work() -> QuantizedFile:
        samples = source.samples("train", model.inputs)
        assert samples is not None
        calibrated = calibrate_onnx(model, CalibrationSamples(samples), options, {precision: out}, kinds=kinds)
        return QuantizedFile(calibrated.models[0], calibrated.report)

    inputs = {
        "onnx": model.sha256,
        "train": sets["train"].key,
        "images": source.images,
        "options": options,
        "outputs": kinds,
        "float": precision,
    }
    return job.ws.stage(f"calibrate-{name}", QuantizedFile, inputs, work)


def profiles(model: OnnxModel, shapes: Mapping[str, tuple[int, ...]], batches: tuple[int, ...]) -> tuple[Profile, ...]:
    """One profile for each batch size; sizes that are dynamic are those of a sample."""

    def whole(shape: tuple[int, ...], batch: int) -> tuple[int, ...]:
        return (batch, *shape[1:])

    return tuple(
        replace(
            profile,
            shapes=tuple(
                ShapeRange(name, whole(shape, profile.min), whole(shape, profile.opt), whole(shape, profile.max))
                for name, shape in shapes.items()
            ),
        )
        for profile in profiles_for(model, batches)
    )


def check(job: Job, model: OnnxModel, kept_dense: tuple[str, ...] = ()) -> ConformanceReport:
    """Check the file that the sparse engine is built from.

    Raises:
        ConformanceError: It is not N:M.
    """
    pattern = job.recipe.mask.pattern

    def work() -> ConformanceReport:
        allowed = tuple(map(glob.escape, kept_dense))
        return require_2to4(model.path, CheckOptions(pattern=pattern, allow_dense=allowed))

    inputs = {"onnx": model.sha256, "pattern": pattern, "kept_dense": kept_dense}
    return job.ws.stage("check", ConformanceReport, inputs, work)


def compare(
    job: Job, source: Source, engines: Engines, sets: dict[str, ImageSet], untouched: OnnxModel | None
) -> ParityReport:
    """Compare the sparse engine with the dense one: classifiers by their labels, other networks output by output.

    Args:
        job: The run.
        source: The file and its data.
        engines: Both engines.
        sets: Digests of the samples.
        untouched: The FP32 file that takes the place of the dense engine where that one is INT8 as well.
    """
    options = job.recipe.compare

    def work() -> ParityReport:
        used = [sets["train"]] if "train" in sets else []
        reference = engines.dense.path if untouched is None else untouched.path
        return compare_files(reference, engines.sparse.path, source.network_options, options, used)

    inputs = {
        "engines": [engine_identity(e) for e in (engines.dense, engines.sparse)],
        **({} if untouched is None else {"untouched": untouched.sha256}),
        "val": sets["val"].key if "val" in sets else None,
        "images": source.images,
        "outputs": source.outputs,
        "metric": metric_key(source.metric) if source.metric is not None else None,
        "options": options,
    }
    return job.ws.stage("compare", ParityReport, inputs, work)


def mask_set(source: Source, dense: OnnxModel, pruned: PrunedFile, method: str, checked: ConformanceReport) -> MaskSet:
    """What the report says of the masks: they are the zeros of the pruned file."""
    pattern = parse_pattern(checked.pattern)
    before, after = (_weights(model, pattern) for model in (dense, pruned.onnx))
    reasons = dict(pruned.left_dense)
    masked, left = [], []
    for weight in _once(checked.weights):
        if weight.verdict != CONFORMING or weight.name not in after:
            reason = reasons.get(weight.name, weight.reason or weight.verdict)
            left.append(DenseLayer(weight.name, weight.shape, 0, reason))
            continue
        values, original = after[weight.name].values, before.get(weight.name)
        kept = kept_best = 1.0
        if original is not None and original.values.shape == values.shape and original.axis is not None:
            magnitude = np.abs(original.values, dtype=np.float64)
            total = float(magnitude.sum()) or 1.0
            kept = float(magnitude[values != 0].sum()) / total
            kept_best = float(magnitude[keep_largest(magnitude, original.axis, pattern)].sum()) / total
        # How often an operator runs is not known from the file alone.
        masked.append(MaskedLayer(weight.name, weight.shape, groups=1, macs=0, kept=kept, kept_best=kept_best))
    return MaskSet(
        path=pruned.onnx.path,
        sha256=pruned.onnx.sha256,
        model=source.path.stem,
        pattern=pattern,
        layout=CHANNEL,
        method=method,
        weights_sha256=dense.sha256,
        masked=tuple(masked),
        dense=tuple(left),
    )


def provenance_of(
    source: Source, dense: OnnxModel, method: str, masks: MaskSet, sets: dict[str, ImageSet]
) -> Provenance:
    """What the report says of the model; of a file of maskplan's own, what its record says."""
    known = dense.provenance
    if known is not None:
        return replace(known, method=method, pattern=str(masks.pattern), layout=CHANNEL)
    samples = source.samples("val", dense.inputs)
    # Arrays are given to the network as they are.
    none = Preprocessing(0, 0, 0, 0, "bilinear", (), ())
    kinds = _kinds(source, dense)
    return Provenance(
        model=source.path.stem,
        trained=True,
        origin=source.path.name,
        dense_sha256=dense.sha256,
        classes=0,
        labels=(),
        preprocessing=samples.preprocessing if isinstance(samples, ImageSamples) else none,
        masked=tuple(m.name for m in masks.masked),
        pattern=str(masks.pattern),
        layout=CHANNEL,
        method=method,
        image_sets=(sets["train"],) if "train" in sets and method == LAYERWISE else (),
        outputs=kinds,
    )


@dataclass(frozen=True)
class _StoredWeight:
    """A weight as its file stores it, and the axis that its groups run along; None if it has none."""

    values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
    axis: int | None


def _weights(model: OnnxModel, pattern: Pattern) -> dict[str, _StoredWeight]:
    """The weights by the names that `prune` gives them: those that a graph computes are stored first."""
    proto, folder = load_onnx(model.path), model.path.parent
    store_computed_weights(proto, folder, pattern.m)
    uses = weight_uses(proto, pattern.m)
    return {u.name: _StoredWeight(native_values(u.tensor, folder), u.axis) for u in uses if u.tensor is not None}


def _once(weights: Sequence[WeightVerdict]) -> list[WeightVerdict]:
    """One verdict for each weight, whatever the number of its uses."""
    return list({weight.name: weight for weight in reversed(weights)}.values())[::-1]


def sample_shapes(source: Source, model: OnnxModel) -> dict[str, tuple[int, ...]]:
    """Shapes of one sample, with its batch axis, of the inputs of which more than the batch is dynamic.

    Raises:
        InputError: Neither the data nor `images.shape` tells them.
    """
    dynamic = [spec for spec in model.inputs if None in spec.shape[1:]]
    if not dynamic:
        return {}
    samples = source.samples("train", model.inputs)
    if samples is not None:
        feeds = next(iter(samples.batches(1)))
        return {spec.name: tuple(feeds[spec.name].shape) for spec in dynamic}
    if len(model.inputs) > 1:
        found = ", ".join(f"{spec.name} {spec.shape}" for spec in dynamic)
        fix = "give --data, a .npz file with an array for each input"
        raise InputError("the sizes of the inputs are dynamic", where=source.path, found=found, fix=fix)
    return {dynamic[0].name: (1, *image_shape(dynamic[0], source.images.shape, source.path.name))}
