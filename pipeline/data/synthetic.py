"""Images that no camera took: arrays of pixels as a data set without classes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from maskplan.pipeline.core.artifacts import ImageSet, Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import UNLABELED, Dataset, Split

SYNTHETIC = "synthetic"
"""How the roles of such image sets begin, in every record."""

_SELECT_SHARE = 8


@dataclass(frozen=True)
class PixelImages:
    """Images (N, H, W, channels) uint8 without labels, which the preprocessing reads back as they are."""

    pixels: npt.NDArray[np.uint8]
    preprocessing: Preprocessing

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return np.full(len(self.pixels), UNLABELED, np.int64)

    def name(self, index: int) -> str:
        return f"{SYNTHETIC} image {index}"

    def read(self, index: int) -> bytes:
        pixels = _with_margins(self.pixels[index], self.preprocessing)
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        buffer = io.BytesIO()
        image.save(buffer, "PPM")
        return buffer.getvalue()


def synthetic_dataset(pixels: npt.NDArray[np.uint8], preprocessing: Preprocessing, classes: tuple[str, ...]) -> Dataset:
    """One in eight images for `select`, the others for `train`; `val` is empty, because such images measure nothing."""
    images, count = PixelImages(pixels, preprocessing), len(pixels)
    select, train = np.split(np.arange(count), [max(count // _SELECT_SHARE, 1)])
    parts = (f"{SYNTHETIC} train", train), (f"{SYNTHETIC} select", select), ("val", np.arange(0))
    return Dataset(classes, *(Split(role, images, indices) for role, indices in parts))


def synthetic_count(image_sets: Sequence[ImageSet]) -> int:
    """How many of the images that shaped something are synthetic."""
    return sum(s.images for s in image_sets if s.role.startswith(SYNTHETIC))


def refuse_data(data: Path | None) -> None:
    """Raise if there are images of the user, which are better.

    Raises:
        InputError: There are.
    """
    if data is not None:
        raise InputError("--synthetic-images are for runs without data", found=data, fix="remove one of them")


def _with_margins(pixels: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Repeat the edges up to the size that is cropped, where the preprocessing resizes to it."""
    size = preprocessing.resize
    height, width = pixels.shape[:2]
    if size == 0:
        return pixels
    margins = []
    for length in (height, width):
        # As the crop rounds it; an image that is larger than the crop's source cannot be read back.
        before = max(round((size - length) / 2), 0)
        margins.append((before, max(size - length - before, 0)))
    return np.pad(pixels, (*margins, (0, 0)), mode="edge")
