"""The recalibrate stage: BatchNorm statistics of the pruned model from training images. Parameters do not change."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Checkpoint, ImageSet, Preprocessing, Provenance, merge_image_sets
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.data.augmentation import augment_images, require_augmentation
from maskplan.pipeline.data.dataset import Split, batches
from maskplan.pipeline.models.checkpoint import save_checkpoint
from maskplan.pipeline.models.dense_statistics import (
    DenseStatistics,
    named_batchnorms,
    observe_dense,
    update_relative,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecalibrateOptions:
    """How to recalibrate.

    Attributes:
        images: Training images to average over; 0 keeps the statistics.
        relative: Correct the statistics by what the dense network's differ by on the same images (`DenseStatistics`).
        batch: Images per batch.
        seed: Selects the images and their order.
        augment: An augmentation as in learning. A network that was trained on images with black borders may lose accuracy
            with statistics of images without them.
    """

    images: int = 10_000
    batch: int = 128
    seed: int = 0
    augment: str = "none"
    relative: bool = True

    def __post_init__(self) -> None:
        at_least(0, images=self.images, seed=self.seed)
        require_augmentation(self.augment)
        # One value per channel has no variance.
        at_least(2, batch=self.batch)


def recalibrate(
    module: nn.Module,
    provenance: Provenance,
    train: Split,
    options: RecalibrateOptions,
    out: Path,
    image_sets: tuple[ImageSet, ...] = (),
    dense: nn.Module | None = None,
) -> Checkpoint:
    """Re-estimate running means and variances and write the checkpoint; only these buffers change.

    A model without BatchNorm is written unchanged, with 0 recalibrated images in its provenance.

    Args:
        module: The pruned model; changed in place.
        provenance: Of its weights.
        train: Training images.
        options: How many of them, and how.
        out: The checkpoint to write.
        image_sets: Digests of `train`, added to the provenance if its images are used.
        dense: The dense model, the reference of `options.relative`; without it, the statistics are those of the images.
    """
    preprocessing = provenance.preprocessing
    reference = dense_statistics(dense, train, preprocessing, options) if dense is not None else None
    images = update_statistics(module, train, preprocessing, options, reference)
    if images == 0:
        reason = "there are fewer than two images" if batchnorm_layers(module) else "the model has no BatchNorm"
        log.info("recalibration is not applicable: %s", reason)
    all_sets = merge_image_sets(provenance.image_sets, image_sets if images else ())
    recalibrated = replace(provenance, recalibrated_images=images, image_sets=all_sets)
    return save_checkpoint(module.state_dict(), recalibrated, out)


def batchnorm_layers(module: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers that keep running statistics."""
    return list(named_batchnorms(module).values())


def dense_statistics(
    dense: nn.Module, train: Split, preprocessing: Preprocessing, options: RecalibrateOptions
) -> DenseStatistics | None:
    """The statistics of the dense network, stored and on the images that `options` draw.

    The network is put in evaluation mode and does not change otherwise.

    Returns:
        None if the options ask for statistics of the images alone, or there are too few images.
    """
    order = _drawn(train, options)
    if not options.relative or not len(order) or not batchnorm_layers(dense):
        return None
    device = next(dense.parameters()).device
    return observe_dense(dense.eval(), _tensors(train, preprocessing, options, order, device))


def update_statistics(
    module: nn.Module,
    train: Split,
    preprocessing: Preprocessing,
    options: RecalibrateOptions,
    reference: DenseStatistics | None = None,
) -> int:
    """Replace a module's BatchNorm statistics, in place, by the average over batches of training images.

    The average is cumulative (every batch has the same weight), and only the BatchNorm layers run in training mode. An
    incomplete last batch is left out: its statistics are noisier but would have the same weight.

    Args:
        module: Its layers are those of `reference`, if that is given.
        train: Training images.
        preprocessing: Preprocessing of the images.
        options: How many images, and how; without a reference, `relative` has no effect.
        reference: Of the dense network on the same images, by which the averages are corrected.

    Returns:
        Number of images used; 0 without BatchNorm layers or with fewer than two images.
    """
    import torch

    layers = named_batchnorms(module).values()
    order = _drawn(train, options)
    if not layers or not len(order):
        return 0
    module.eval()
    images = _tensors(train, preprocessing, options, order, next(module.parameters()).device)
    if reference is not None:
        update_relative(module, images, reference)
        return len(order)
    before = []
    for layer in layers:
        before.append((layer.momentum, copy.deepcopy(layer.state_dict())))
        layer.reset_running_stats()
        # In PyTorch, no momentum means the cumulative average.
        layer.momentum = None
        layer.train()
    try:
        with torch.no_grad():
            for batch in images:
                module(batch)
    finally:
        for layer, (momentum, state) in zip(layers, before, strict=True):
            layer.momentum = momentum
            # Auxiliary heads that run only in training mode have seen no image.
            if layer.num_batches_tracked == 0:
                layer.load_state_dict(state)
        module.eval()
    return len(order)


def _drawn(train: Split, options: RecalibrateOptions) -> npt.NDArray[np.int64]:
    """Positions of the images in the split, in their order; none if there are fewer than two."""
    count = min(options.images, len(train))
    order = np.random.default_rng(options.seed).permutation(len(train))[: count if count >= 2 else 0]
    return order[: count - count % options.batch] if count > options.batch else order


def _tensors(
    train: Split,
    preprocessing: Preprocessing,
    options: RecalibrateOptions,
    order: npt.NDArray[np.int64],
    device: torch.device,
) -> Iterator[torch.Tensor]:
    """The images in batches, augmented."""
    import torch

    size = min(options.batch, len(order))
    for i, (x, _) in enumerate(batches(train, preprocessing, size, order)):
        yield torch.from_numpy(augment_images(x, options.augment, preprocessing, options.seed + i)).to(device)
