"""What learning and recalibration may do to images beyond their preprocessing; the seed of the step decides."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError

AUGMENTATIONS = ("none", "shift", "shift+flip", "crop", "crop+flip")
_SHARE = 8


def require_augmentation(name: str) -> None:
    """Raise unless there is such an augmentation.

    Raises:
        InputError: There is none.
    """
    if name not in AUGMENTATIONS:
        raise InputError(f"augment is {name!r}", fix=f"choose one of {', '.join(AUGMENTATIONS)}")


def augmented(
    images: npt.NDArray[np.float32], kind: str, preprocessing: Preprocessing, seed: int
) -> npt.NDArray[np.float32]:
    """Move each image by up to an eighth of its size, and mirror half of them if asked.

    Args:
        images: (N, channels, H, W), preprocessed.
        kind: `none`; `shift` repeats the edge, `crop` is black beyond it; `+flip` mirrors.
        preprocessing: What black is after preprocessing.
        seed: Of the draw.
    """
    if kind == "none":
        return images
    moves, _, flips = kind.partition("+")
    count, _, height, width = images.shape
    generator = np.random.default_rng(seed)
    rows, beyond_rows = _moved(height, count, generator)
    columns, beyond_columns = _moved(width, count, generator)
    if flips:
        mirrored = generator.random(count) < 0.5
        columns[mirrored] = columns[mirrored, ::-1]
        beyond_columns[mirrored] = beyond_columns[mirrored, ::-1]
    picked = images[np.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    if moves == "crop":
        black = -np.asarray(preprocessing.mean, np.float32) / np.asarray(preprocessing.std, np.float32)
        picked[beyond_rows[:, :, None] | beyond_columns[:, None, :]] = black
    return np.ascontiguousarray(picked.transpose(0, 3, 1, 2))


def _moved(
    size: int, count: int, generator: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Where each pixel comes from, and whether that is beyond the edge."""
    most = size // _SHARE
    offsets = generator.integers(-most, most + 1, count)
    wanted = np.arange(size) + offsets[:, None]
    moved: npt.NDArray[np.int64] = np.clip(wanted, 0, size - 1)
    return moved, wanted != moved
