"""Which images ranges are measured on: as many of each class, drawn with a seed, prepared as the checkpoint wants them."""

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
    """At most `count` images, as many of each class as there are, drawn with `seed`.

    Classes give one image a round until there are enough, so that a class that runs out leaves its share to the others.

    Args:
        train: Training images; those of `val` must not shape what is judged on them.
        count: How many.
        seed: For the draw.

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
        log.warning("all images are of one class: ranges may be too narrow for others")
    # The round in which an image would be taken: how many of its class come before it in the drawn order.
    rounds = np.empty(len(order), np.int64)
    for label in classes:
        members = np.flatnonzero(labels == label)
        rounds[members] = np.arange(len(members))
    chosen = order[np.argsort(rounds, kind="stable")[:count]]
    return replace(train, indices=np.sort(train.indices[chosen]))


def calibration_batches(split: Split, preprocessing: Preprocessing, size: int) -> Iterator[npt.NDArray[np.float32]]:
    """Batches (N, channels, H, W), float32, in the split's order; progress is shown as they are taken."""
    for images, _ in track(batches(split, preprocessing, size), "calibrate", -(-len(split) // size)):
        yield images
