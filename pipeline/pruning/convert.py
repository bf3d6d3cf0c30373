"""The convert stage: turns an unstructured sparse checkpoint into an N:M one, layer by layer on a few unlabeled images.

After AdaPrune (Hubara et al. 2021): each layer gets the mask that changes its outputs least (`masking/layerwise`), for which
existing zeros cost nothing; then, unless `update` is off, the kept weights are refitted to reproduce the source's outputs
(`least_squares`). Every layer gets the inputs it has in the source network, so the order of layers does not matter.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Checkpoint, ImageSet, Layer, Provenance, merge_image_sets
from maskplan.pipeline.core.choices import CHANNEL
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.data.dataset import Dataset, Split, batches, require_select
from maskplan.pipeline.masking.layerwise import layerwise_mask, output_error, unfold_weight
from maskplan.pipeline.masking.magnitude import kept_magnitude
from maskplan.pipeline.masking.patterns import parse_pattern
from maskplan.pipeline.masking.policy import LayerPolicy, select_layers
from maskplan.pipeline.models.batchnorm import RecalibrateOptions, recalibrate
from maskplan.pipeline.models.device import choose_device
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.pruning.least_squares import fit_under_mask
from maskplan.pipeline.pruning.second_moments import MomentOptions, SecondMoments, second_moments

if TYPE_CHECKING:
    from torch import nn

CONVERTED, UPDATED = "converted", "converted, updated"


@dataclass(frozen=True)
class ConvertOptions:
    """Options of conversion.

    Attributes:
        pattern: N:M.
        update: Refit the kept weights; otherwise they are not changed.
        images: Number of training images, drawn with the seed.
        damping: Regularization of refitted weights towards the source's, as a fraction of the inputs' mean square.
        include_linear: Convert linear layers too.
        layers: Name patterns of the weights to convert; all eligible ones by default.
        min_channels: Do not convert convolutions with fewer input channels.
        seed: Seed of the choice of images.
    """

    pattern: str = "2:4"
    update: bool = True
    images: int = 512
    damping: float = 0.01
    include_linear: bool = False
    layers: tuple[str, ...] = ()
    min_channels: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        parse_pattern(self.pattern)
        at_least(1, images=self.images)
        at_least(0, damping=self.damping, min_channels=self.min_channels, seed=self.seed)


@dataclass(frozen=True)
class ConvertedLayer:
    """What conversion changed in one layer, in percent.

    Attributes:
        name: Name of the weight.
        shape: Shape of the weight.
        zeros: Zeros among the source's weights.
        dropped: Dropped weights among the source's non-zeros.
        kept_magnitude: Kept share of the source's absolute sum, before any update.
        error: Mean squared change of the outputs from dropping weights, relative to the outputs' mean square.
        updated_error: The same after refitting; None without an update.
    """

    name: str
    shape: tuple[int, ...]
    zeros: float
    dropped: float
    kept_magnitude: float
    error: float
    updated_error: float | None


@dataclass(frozen=True)
class ConversionReport:
    """What conversion changed, per layer and on the `select` images.

    Attributes:
        pattern: N:M.
        updated: Whether kept weights were refitted.
        images: Training images that the layers' inputs were taken from.
        layers: The converted layers.
        dense: Names of the others.
        recalibrated_images: Images that BatchNorm statistics were estimated from.
        select_images: Held-out training images.
        select_top1_source: Top-1 accuracy in percent; None without labels or classes.
        select_top1_converted: The same after conversion.
        select_divergence: Of the converted network's outputs from the source's, as learned masks are scored.
    """

    pattern: str
    updated: bool
    images: int
    layers: tuple[ConvertedLayer, ...]
    dense: tuple[str, ...]
    recalibrated_images: int
    select_images: int
    select_top1_source: float | None
    select_top1_converted: float | None
    select_divergence: float


def convert(
    module: nn.Module,
    provenance: Provenance,
    data: Dataset,
    options: ConvertOptions,
    recalibrate_options: RecalibrateOptions,
    out: Path,
    image_sets: tuple[ImageSet, ...] = (),
    device: str = "auto",
) -> tuple[Checkpoint, ConversionReport]:
    """Write the N:M checkpoint with recalibrated BatchNorm statistics; `module` is not changed.

    Where a constant added to the outputs has no effect, errors are taken about the mean: before a BatchNorm that is
    recalibrated, and, with an update, in layers with a bias, which then absorbs the mean error.

    Args:
        module: The source network.
        provenance: Of its weights.
        data: `train` for second moments and BatchNorm statistics, `select` for the report.
        options: Options of conversion.
        recalibrate_options: Options of BatchNorm recalibration.
        out: The checkpoint to write.
        image_sets: Digests of the images in `data`, for the record.
        device: Where the network runs: `auto`, `cpu` or `cuda`.

    Raises:
        InputError: No layer can be converted, no image is left for the `select` part, or weights or activations are not
            finite; nothing is written.
        HostError: numba is not installed.
    """
    import torch

    require_select(data.select)
    pattern = parse_pattern(options.pattern)
    preprocessing = provenance.preprocessing
    layers, _ = trace_layers(module, preprocessing)
    selection = select_layers(
        layers, pattern, LayerPolicy(options.include_linear, options.layers, options.min_channels)
    )
    source = copy.deepcopy(module).to(choose_device(device)).eval()
    converted = copy.deepcopy(source)
    parameters = dict(converted.named_parameters(remove_duplicate=False))
    moment_options = MomentOptions(images=options.images, seed=options.seed)
    moments = second_moments(source, selection.masked, preprocessing, data.train, moment_options)
    converted_layers = []
    for layer, moment in track(moments, "convert", len(selection.masked)):
        weight = parameters[layer.name]
        bias = parameters.get(f"{layer.name.removesuffix('weight')}bias")
        # A copy, because the parameter is overwritten below.
        original = weight.detach().cpu().float().numpy().copy()
        is_mean_absorbed = (moment.before_norm and recalibrate_options.images > 0) or (
            options.update and bias is not None
        )
        second = moment.about_mean if is_mean_absorbed else moment.about_zero
        mask = layerwise_mask(original, second, pattern, name=layer.name)
        dropped = np.where(mask, original, np.float32(0))
        updated = fit_under_mask(original, mask, second, options.damping) if options.update else None
        new = dropped if updated is None else updated
        with torch.no_grad():
            weight.copy_(torch.from_numpy(new))
            if updated is not None and bias is not None:
                bias.add_(torch.from_numpy(_mean_output(original - new, moment)).to(bias))
        converted_layers.append(_describe(layer, original, mask, second, dropped, updated))
    converted_provenance = replace(
        provenance,
        masked=tuple(layer.name for layer in selection.masked),
        pattern=str(pattern),
        layout=CHANNEL,
        method=UPDATED if options.update else CONVERTED,
        image_sets=merge_image_sets(provenance.image_sets, image_sets),
    )
    checkpoint = recalibrate(converted, converted_provenance, data.train, recalibrate_options, out, image_sets, source)
    change = _change(source, converted, provenance, data.select)
    return checkpoint, ConversionReport(
        pattern=str(pattern),
        updated=options.update,
        images=min(options.images, len(data.train)),
        layers=tuple(converted_layers),
        dense=tuple(d.name for d in selection.dense),
        recalibrated_images=checkpoint.provenance.recalibrated_images,
        select_images=len(data.select),
        select_top1_source=change.top1_source,
        select_top1_converted=change.top1_converted,
        select_divergence=change.divergence,
    )


def _mean_output(weight: npt.NDArray[np.floating], moment: SecondMoments) -> npt.NDArray[np.float32]:
    """The mean of each output channel, (K,), under these weights (K, C, ...) without bias."""
    mean: npt.NDArray[np.float32] = (unfold_weight(weight) @ moment.mean).astype(np.float32)
    return mean


def _describe(
    layer: Layer,
    original: npt.NDArray[np.floating],
    mask: npt.NDArray[np.bool_],
    moment: npt.NDArray[np.float32],
    dropped: npt.NDArray[np.floating],
    updated: npt.NDArray[np.floating] | None,
) -> ConvertedLayer:
    nonzero = original != 0
    total = float(output_error(original, moment).sum())

    def error(new: npt.NDArray[np.floating]) -> float:
        return 100 * float(output_error(original - new, moment).sum()) / total if total > 0 else 0.0

    return ConvertedLayer(
        layer.name,
        layer.shape,
        zeros=100 * float(1 - nonzero.mean()),
        dropped=100 * float((nonzero & ~mask).sum()) / max(int(nonzero.sum()), 1),
        kept_magnitude=100 * kept_magnitude(original, mask),
        error=error(dropped),
        updated_error=None if updated is None else error(updated),
    )


@dataclass(frozen=True)
class _Change:
    """Of the outputs on some images; accuracies in percent, None without labels or classes."""

    top1_source: float | None
    top1_converted: float | None
    divergence: float


def _change(source: nn.Module, converted: nn.Module, provenance: Provenance, split: Split, batch: int = 64) -> _Change:
    import torch

    from maskplan.pipeline.learning.output_loss import output_loss

    preprocessing, device = provenance.preprocessing, next(source.parameters()).device
    loss = output_loss(source, provenance.outputs, split, preprocessing, batch)
    divergence, right, right_source = 0.0, 0, 0
    with torch.no_grad():
        for x, labels in batches(split, preprocessing, batch):
            images = torch.from_numpy(x).to(device)
            before, after = (loss.select(network(images)) for network in (source, converted))
            divergence += len(x) * float(loss(after, before, 1.0))
            if loss.is_classifier:
                right_source += int((before[0].argmax(dim=1).cpu().numpy() == labels).sum())
                right += int((after[0].argmax(dim=1).cpu().numpy() == labels).sum())
    count = len(split)
    if not loss.is_classifier or not (split.labels >= 0).all():
        return _Change(None, None, divergence / count)
    return _Change(100 * right_source / count, 100 * right / count, divergence / count)
