"""What learning does to images beyond their preprocessing; the seed of the step decides."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_SHARE = 8


def augmented(images: npt.NDArray[np.float32], how: str, seed: int) -> npt.NDArray[np.float32]:
    """Shift each image by up to an eighth of its size, its edge repeated, and mirror half of them if asked.

    Args:
        images: (N, channels, H, W).
        how: `none`, `shift` or `shift+flip`.
        seed: Of the draw.
    """
    if how == "none":
        return images
    count, _, height, width = images.shape
    generator = np.random.default_rng(seed)
    rows = _moved(height, count, generator)
    columns = _moved(width, count, generator)
    if how == "shift+flip":
        mirrored = generator.random(count) < 0.5
        columns[mirrored] = columns[mirrored, ::-1]
    picked = images[np.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return np.ascontiguousarray(picked.transpose(0, 3, 1, 2))


def _moved(size: int, count: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    most = size // _SHARE
    offsets = generator.integers(-most, most + 1, count)
    moved: npt.NDArray[np.int64] = np.clip(np.arange(size) + offsets[:, None], 0, size - 1)
    return moved
