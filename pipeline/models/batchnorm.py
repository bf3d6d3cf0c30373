"""The recalibrate stage: BatchNorm statistics of the pruned model from training images. Parameters stay as they are."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maskplan.pipeline.core.artifacts import Checkpoint, ImageSet, Preprocessing, Provenance
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.data.augmentation import augmented, require_augmentation
from maskplan.pipeline.data.dataset import Split, batches
from maskplan.pipeline.models.checkpoint import save_checkpoint

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecalibrateOptions:
    """How to recalibrate.

    Attributes:
        images: Training images to average over; 0 leaves the statistics alone.
        batch: Images a batch.
        seed: Which images, and their order.
        augment: As of learning. A network whose own training saw black borders may lose points by statistics without them.
    """

    images: int = 10_000
    batch: int = 128
    seed: int = 0
    augment: str = "none"

    def __post_init__(self) -> None:
        at_least(0, images=self.images, seed=self.seed)
        require_augmentation(self.augment)
        # Statistics of one image are none.
        at_least(2, batch=self.batch)


def recalibrate(
    module: nn.Module,
    provenance: Provenance,
    train: Split,
    options: RecalibrateOptions,
    out: Path,
    image_sets: tuple[ImageSet, ...] = (),
) -> Checkpoint:
    """Estimate running means and variances anew and write the checkpoint; only these buffers change.

    A model without BatchNorm is written as it is, with 0 recalibrated images in its record.
    """
    images = update_statistics(module, train, provenance.preprocessing, options)
    if images == 0:
        why = "there are fewer than two images" if norms(module) else "the model has no BatchNorm"
        log.info("recalibration is not applicable: %s", why)
    added = tuple(s for s in image_sets if images and s not in provenance.image_sets)
    changed = replace(provenance, recalibrated_images=images, image_sets=(*provenance.image_sets, *added))
    return save_checkpoint(module.state_dict(), changed, out)


def norms(module: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers that keep running statistics."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def update_statistics(
    module: nn.Module, train: Split, preprocessing: Preprocessing, options: RecalibrateOptions
) -> int:
    """Replace a module's BatchNorm statistics, in place, by the average over batches of training images.

    The average is cumulative (every batch counts the same); all else stays in evaluation mode. A last
    batch that is not full is left out, for its statistics would count too much.

    Returns:
        Images used; 0 when there is nothing to do.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    layers = norms(module)
    images = min(options.images, len(train))
    if not layers or images < 2:
        return 0
    module.eval()
    before = []
    for layer in layers:
        assert isinstance(layer, _BatchNorm)
        before.append((layer.momentum, copy.deepcopy(layer.state_dict())))
        layer.reset_running_stats()
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
                module(torch.from_numpy(augmented(x, options.augment, preprocessing, options.seed + i)).to(device))
    finally:
        for layer, (momentum, state) in zip(layers, before, strict=True):
            assert isinstance(layer, _BatchNorm)
            layer.momentum = momentum
            # Heads that run only in training see no image here.
            if layer.num_batches_tracked == 0:
                layer.load_state_dict(state)
        module.eval()
    return len(order)
