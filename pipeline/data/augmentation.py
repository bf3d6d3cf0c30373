"""Random shifts and mirroring of preprocessed images, for learning and recalibration; repeatable by seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError

AUGMENTATIONS = ("none", "shift", "shift+flip", "crop", "crop+flip")
_MAX_SHIFT_DIVISOR = 8


def require_augmentation(name: str) -> None:
    """Raise unless an augmentation has this name.

    Raises:
        InputError: None has.
    """
    if name not in AUGMENTATIONS:
        raise InputError(f"augment is {name!r}", fix=f"choose one of {', '.join(AUGMENTATIONS)}")


def augment_images(
    images: npt.NDArray[np.float32], kind: str, preprocessing: Preprocessing, seed: int
) -> npt.NDArray[np.float32]:
    """Shift each image by up to an eighth of its size, and mirror half of the images if `kind` says so.

    Args:
        images: (N, channels, H, W), preprocessed.
        kind: `none`; `shift` repeats the edge pixels, `crop` fills with black; `+flip` also mirrors.
        preprocessing: Determines what black is after normalization.
        seed: For the random choices.
    """
    if kind == "none":
        return images
    shift, _, flip = kind.partition("+")
    count, _, height, width = images.shape
    generator = np.random.default_rng(seed)
    rows, rows_outside = _shifted(height, count, generator)
    columns, columns_outside = _shifted(width, count, generator)
    if flip:
        mirrored = generator.random(count) < 0.5
        columns[mirrored] = columns[mirrored, ::-1]
        columns_outside[mirrored] = columns_outside[mirrored, ::-1]
    # Advanced indices around a slice put the channels last.
    result = images[np.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    if shift == "crop":
        black = -np.asarray(preprocessing.mean, np.float32) / np.asarray(preprocessing.std, np.float32)
        result[rows_outside[:, :, None] | columns_outside[:, None, :]] = black
    # A copy: with one channel, NumPy takes the array for contiguous, and PyTorch takes its strides for channels-last.
    return result.transpose(0, 3, 1, 2).copy(order="C")


def _shifted(
    size: int, count: int, generator: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Source position of each pixel along one axis, (count, size), and whether it lies outside the image."""
    max_shift = size // _MAX_SHIFT_DIVISOR
    offsets = generator.integers(-max_shift, max_shift + 1, count)
    source = np.arange(size) + offsets[:, None]
    clipped: npt.NDArray[np.int64] = np.clip(source, 0, size - 1)
    return clipped, source != clipped
