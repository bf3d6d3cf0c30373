"""The recalibrate stage: BatchNorm statistics of the pruned model from training images. Parameters do not change."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maskplan.pipeline.core.artifacts import Checkpoint, ImageSet, Preprocessing, Provenance, merge_image_sets
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.data.augmentation import augment_images, require_augmentation
from maskplan.pipeline.data.dataset import Split, batches
from maskplan.pipeline.models.checkpoint import save_checkpoint

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecalibrateOptions:
    """How to recalibrate.

    Attributes:
        images: Training images to average over; 0 keeps the statistics.
        batch: Images per batch.
        seed: Selects the images and their order.
        augment: An augmentation as in learning. A network that was trained on images with black borders may lose accuracy
            with statistics of images without them.
    """

    images: int = 10_000
    batch: int = 128
    seed: int = 0
    augment: str = "none"

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
    """
    images = update_statistics(module, train, provenance.preprocessing, options)
    if images == 0:
        reason = "there are fewer than two images" if batchnorm_layers(module) else "the model has no BatchNorm"
        log.info("recalibration is not applicable: %s", reason)
    all_sets = merge_image_sets(provenance.image_sets, image_sets if images else ())
    recalibrated = replace(provenance, recalibrated_images=images, image_sets=all_sets)
    return save_checkpoint(module.state_dict(), recalibrated, out)


def batchnorm_layers(module: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers that keep running statistics."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def update_statistics(
    module: nn.Module, train: Split, preprocessing: Preprocessing, options: RecalibrateOptions
) -> int:
    """Replace a module's BatchNorm statistics, in place, by the average over batches of training images.

    The average is cumulative (every batch has the same weight), and only the BatchNorm layers run in training mode. An
    incomplete last batch is left out: its statistics are noisier but would have the same weight.

    Returns:
        Number of images used; 0 without BatchNorm layers or with fewer than two images.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    layers = batchnorm_layers(module)
    images = min(options.images, len(train))
    if not layers or images < 2:
        return 0
    module.eval()
    before = []
    for layer in layers:
        assert isinstance(layer, _BatchNorm)
        before.append((layer.momentum, copy.deepcopy(layer.state_dict())))
        layer.reset_running_stats()
        # In PyTorch, no momentum means the cumulative average.
        layer.momentum = None
        layer.train()
    order = np.random.default_rng(options.seed).permutation(len(train))[:images]
    if images > options.batch:
        order = order[: images - images % options.batch]
    size = min(options.batch, images)
    device = next(module.parameters()).device
    try:
        with torch.no_grad():
            for i, (x, _) in enumerate(batches(train, preprocessing, size, order)):
                module(torch.from_numpy(augment_images(x, options.augment, preprocessing, options.seed + i)).to(device))
    finally:
        for layer, (momentum, state) in zip(layers, before, strict=True):
            assert isinstance(layer, _BatchNorm)
            layer.momentum = momentum
            # Auxiliary heads that run only in training mode have seen no image.
            if layer.num_batches_tracked == 0:
                layer.load_state_dict(state)
        module.eval()
    return len(order)
