"""The convert stage: a checkpoint with zeros anywhere to one that is N:M, layer by layer on a few images, without labels.

After AdaPrune (Hubara et al. 2021): each layer's mask is the one that changes its outputs least (`masking/layerwise`), where
zeros that are there cost nothing to drop; then, unless `update` is off, the kept weights are fitted to give the source's
outputs back (`least_squares`). All layers see what the source's layers see, so their order does not matter.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Checkpoint, ImageSet, Layer, Provenance
from maskplan.pipeline.core.choices import CHANNEL
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.data.dataset import Dataset, Split, batches
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
    """How to convert.

    Attributes:
        pattern: N:M.
        update: Fit the kept weights; otherwise they stay as they are.
        images: Training images, drawn with the seed.
        damping: How far fitted weights are held to the source's, as a share of the inputs' mean square.
        include_linear: Convert linear layers too.
        layers: Patterns of names of the weights to convert; all eligible ones by default.
        min_channels: Leave convolutions with fewer input channels as they are.
        seed: Which images.
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
    """What one layer lost, in percent.

    Attributes:
        zeros: Of the source's weights.
        dropped: Of the source's non-zeros.
        kept_magnitude: Of the source's absolute sum, before any update.
        error: Mean square of the change of the outputs, of the outputs' own, when the weights are dropped.
        updated_error: The same after the fit; None without one.
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
    """What conversion lost: layer by layer, and in percent of the `select` images that are right."""

    pattern: str
    updated: bool
    images: int
    layers: tuple[ConvertedLayer, ...]
    dense: tuple[str, ...]
    recalibrated_images: int
    select_images: int
    select_top1_source: float
    select_top1_converted: float


def convert(
    module: nn.Module,
    provenance: Provenance,
    data: Dataset,
    options: ConvertOptions,
    statistics: RecalibrateOptions,
    out: Path,
    image_sets: tuple[ImageSet, ...] = (),
    device: str = "auto",
) -> tuple[Checkpoint, ConversionReport]:
    """Write the N:M checkpoint, with BatchNorm statistics estimated anew; `module` stays as it is.

    Where an added constant does not matter, errors are taken about the mean: before a BatchNorm that is recalibrated, and
    with an update where the layer has a bias, which then takes the mean error up.

    Args:
        module: The source.
        provenance: Of its weights.
        data: `train` for moments and statistics, `select` for the report.
        options: Pattern, update, images.
        statistics: How BatchNorm is recalibrated.
        out: The checkpoint to write.
        image_sets: Which images `data` holds, for the record.
        device: Where the network runs: `auto`, `cpu` or `cuda`.

    Raises:
        InputError: Nothing can be converted, or weights or activations are not numbers; nothing is written.
        HostError: numba is not installed.
    """
    import torch

    pattern = parse_pattern(options.pattern)
    how = provenance.preprocessing
    layers, _ = trace_layers(module, how)
    selection = select_layers(
        layers, pattern, LayerPolicy(options.include_linear, options.layers, options.min_channels)
    )
    source = copy.deepcopy(module).to(choose_device(device)).eval()
    converted = copy.deepcopy(source)
    parameters = dict(converted.named_parameters(remove_duplicate=False))
    counted = MomentOptions(images=options.images, seed=options.seed)
    moments = second_moments(source, selection.masked, how, data.train, counted)
    found = []
    for layer, moment in track(moments, "convert", len(selection.masked)):
        weight = parameters[layer.name]
        bias = parameters.get(f"{layer.name.removesuffix('weight')}bias")
        # A copy: the parameter is written to.
        original = weight.detach().cpu().float().numpy().copy()
        absorbs = (moment.before_norm and statistics.images > 0) or (options.update and bias is not None)
        about = moment.about_mean if absorbs else moment.about_zero
        mask = layerwise_mask(original, about, pattern, name=layer.name)
        dropped = np.where(mask, original, np.float32(0))
        updated = fit_under_mask(original, mask, about, options.damping) if options.update else None
        new = dropped if updated is None else updated
        with torch.no_grad():
            weight.copy_(torch.from_numpy(new))
            if updated is not None and bias is not None:
                bias.add_(torch.from_numpy(_mean_error(original - new, moment)).to(bias))
        found.append(_lost(layer, original, mask, about, dropped, updated))
    made = replace(
        provenance,
        masked=tuple(layer.name for layer in selection.masked),
        pattern=str(pattern),
        layout=CHANNEL,
        method=UPDATED if options.update else CONVERTED,
        image_sets=(*provenance.image_sets, *(s for s in image_sets if s not in provenance.image_sets)),
    )
    before = _top1(source, provenance, data.select)
    checkpoint = recalibrate(converted, made, data.train, statistics, out, image_sets)
    return checkpoint, ConversionReport(
        pattern=str(pattern),
        updated=options.update,
        images=min(options.images, len(data.train)),
        layers=tuple(found),
        dense=tuple(d.name for d in selection.dense),
        recalibrated_images=checkpoint.provenance.recalibrated_images,
        select_images=len(data.select),
        select_top1_source=before,
        select_top1_converted=_top1(converted, provenance, data.select),
    )


def _mean_error(difference: npt.NDArray[np.floating], moment: SecondMoments) -> npt.NDArray[np.float32]:
    """What the new weights leave out of each output on average."""
    lost: npt.NDArray[np.float32] = (unfold_weight(difference) @ moment.mean).astype(np.float32)
    return lost


def _lost(
    layer: Layer,
    original: npt.NDArray[np.floating],
    mask: npt.NDArray[np.bool_],
    moment: npt.NDArray[np.float32],
    dropped: npt.NDArray[np.floating],
    updated: npt.NDArray[np.floating] | None,
) -> ConvertedLayer:
    there = original != 0
    whole = float(output_error(original, moment).sum())

    def error(new: npt.NDArray[np.floating]) -> float:
        return 100 * float(output_error(original - new, moment).sum()) / whole if whole > 0 else 0.0

    return ConvertedLayer(
        layer.name,
        layer.shape,
        zeros=100 * float(1 - there.mean()),
        dropped=100 * float((there & ~mask).sum()) / max(int(there.sum()), 1),
        kept_magnitude=100 * kept_magnitude(original, mask),
        error=error(dropped),
        updated_error=None if updated is None else error(updated),
    )


def _top1(module: nn.Module, provenance: Provenance, split: Split, batch: int = 64) -> float:
    import torch

    device = next(module.parameters()).device
    right = 0
    with torch.no_grad():
        for x, labels in batches(split, provenance.preprocessing, batch):
            found = module(torch.from_numpy(x).to(device)).argmax(dim=1).cpu().numpy()
            right += int((found == labels).sum())
    return 100 * right / len(split)
