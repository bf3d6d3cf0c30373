"""The images on which ranges are measured: balanced over classes, drawn with a seed, preprocessed for the checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.data.dataset import Split, batches

log = logging.getLogger(__name__)


def choose_images(train: Split, count: int, seed: int) -> Split:
    """Draw at most `count` images, equally many of each class as far as there are enough.

    Each class contributes one image per round until there are enough images; a class without further images is skipped.

    Args:
        train: Training images. Not images of `val`, which must not influence a model that is evaluated on them.
        count: Number of images.
        seed: Of the draw.

    Raises:
        InputError: There are no images.
    """
    if not len(train):
        raise InputError(
            "no images to calibrate on", found=f"{train.role}: 0 images", fix="give --data with images in train/"
        )
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(train))
    labels = train.labels[order]
    classes = np.unique(labels)
    if len(classes) == 1:
        log.warning("all calibration images are of one class: ranges may be too narrow for other classes")
    # The round in which each image is taken: the number of images of its class before it in the drawn order.
    rounds = np.empty(len(order), np.int64)
    for label in classes:
        members = np.flatnonzero(labels == label)
        rounds[members] = np.arange(len(members))
    chosen = order[np.argsort(rounds, kind="stable")[:count]]
    return replace(train, indices=np.sort(train.indices[chosen]))


def calibration_batches(split: Split, preprocessing: Preprocessing, size: int) -> Iterator[npt.NDArray[np.float32]]:
    """Batches (N, channels, H, W), float32, in the order of the split; shows progress."""
    for images, _ in track(batches(split, preprocessing, size), "calibrate", -(-len(split) // size)):
        yield images
