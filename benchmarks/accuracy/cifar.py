"""CIFAR-10 from .npz files of JPEG bytes, as a `Dataset` and as tensors for training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import Dataset, Split, dataset_from_train_val
from maskplan.pipeline.data.preprocessing import decode

HOW = Preprocessing(3, 32, 32, 0, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_PADDING = 4


@dataclass(frozen=True)
class JpegImages:
    """Images in one array of bytes: image i is `jpeg[offset[i]:offset[i + 1]]`."""

    role: str
    jpeg: npt.NDArray[np.uint8]
    offset: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]

    def name(self, index: int) -> str:
        return f"{self.role} image {index}"

    def read(self, index: int) -> bytes:
        return self.jpeg[self.offset[index] : self.offset[index + 1]].tobytes()


def load_cifar10(folder: Path, seed: int = 0, most: int | None = None) -> Dataset:
    """Read `cifar10_train.npz` and `cifar10_test.npz`.

    Args:
        folder: Folder of the two files.
        seed: Seed of the `select` part.
        most: Use only the first images of each file, up to this number; their order is a fixed shuffle.

    Raises:
        InputError: A file is missing.
    """
    parts = []
    for role, name in (("train", "cifar10_train.npz"), ("val", "cifar10_test.npz")):
        if not (folder / name).is_file():
            raise InputError("CIFAR-10 not found", where=folder / name, fix="give its folder with --data")
        with np.load(folder / name) as stored:
            labels = stored["label"].astype(np.int64)[:most]
            parts.append(JpegImages(role, stored["jpeg"], stored["offset"], labels))
            classes = tuple(str(c) for c in stored["classes"])
    return dataset_from_train_val(parts[0], parts[1], classes, seed)


def pixels(split: Split) -> torch.Tensor:
    """All images of a split, decoded: (N, 3, 32, 32) uint8."""
    images = np.stack([decode(split.images.read(int(i)), HOW) for i in split.indices])
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def normalized(images: torch.Tensor) -> torch.Tensor:
    """Normalize pixels (N, 3, H, W), uint8, for the networks."""
    mean = torch.tensor(HOW.mean, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(HOW.std, device=images.device).view(1, 3, 1, 1)
    return (images.float() / 255 - mean) / std


def shifted_and_flipped(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift each image by up to 4 pixels along both axes, filling with black, and mirror it with probability 1/2."""
    count, _, height, width = images.shape
    padded = F.pad(images, (_PADDING,) * 4)
    top, left = (torch.randint(0, 2 * _PADDING + 1, (count, 1, 1), generator=generator) for _ in range(2))
    mirrored = torch.rand((count, 1, 1), generator=generator) < 0.5
    rows = top + torch.arange(height).view(1, -1, 1)
    columns = torch.arange(width).view(1, 1, -1)
    columns = left + torch.where(mirrored, width - 1 - columns, columns)
    picked = padded.permute(0, 2, 3, 1)[torch.arange(count).view(-1, 1, 1), rows, columns]
    return picked.permute(0, 3, 1, 2).contiguous()
