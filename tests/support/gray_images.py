"""Gray images of 2x4 pixels that exist in memory only, and datasets made of them."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.data.dataset import Dataset, Images, Split

PREPROCESSING = Preprocessing(1, 2, 4, 0, "bilinear", (0.5,), (0.25,))
_ROLES = ("train", "select", "val")


@dataclasses.dataclass(frozen=True)
class GrayImages:
    """Images (N, 8) uint8 with labels (N,)."""

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self.pixels[index].reshape(2, 4)).save(buffer, "PPM")
        return buffer.getvalue()


def random_images(count: int, seed: int = 0) -> GrayImages:
    """Noise, labeled 0, 1, 2 in turn."""
    return GrayImages(np.random.default_rng(seed).integers(0, 256, (count, 8), np.uint8), np.arange(count) % 3)


def dataset(images: Images, train: int) -> Dataset:
    """The first `train` images to learn from, all others for `select`; `val` is empty."""
    parts = np.split(np.arange(len(images.labels)), [train, len(images.labels)])
    return Dataset(("a", "b", "c"), *(Split(role, images, at) for role, at in zip(_ROLES, parts, strict=True)))
