"""scikit-learn's 1,797 handwritten digits (8x8, gray) as labeled images."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import HostError
from maskplan.pipeline.data.dataset import Dataset, split_collection

BUNDLED_MODEL = "digits_resnet"
"""The model that comes with maskplan, trained on these images."""

PREPROCESSING = Preprocessing(1, 8, 8, 0, "bilinear", (0.3053,), (0.3765,))
CLASSES = tuple(str(digit) for digit in range(10))
VAL_SHARE, SPLIT_SEED = 0.2, 0


@dataclass(frozen=True)
class _Digits:
    files: tuple[bytes, ...]
    labels: npt.NDArray[np.int64]

    def name(self, index: int) -> str:
        return f"digit {index}"

    def read(self, index: int) -> bytes:
        return self.files[index]


@cache
def load_digits() -> Dataset:
    """The digits, with a fifth of each class as `val`; the split is fixed, so that the bundled weights never saw `val`.

    Raises:
        HostError: scikit-learn, which contains the images, is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise HostError(
            "the bundled digits are part of scikit-learn, which is not installed",
            fix="pip install scikit-learn, or give your own images with --data",
        ) from error
    from PIL import Image

    source = load()
    files = []
    for pixels in source.images:
        buffer = io.BytesIO()
        Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).save(buffer, "PPM")
        files.append(buffer.getvalue())
    return split_collection(_Digits(tuple(files), source.target.astype(np.int64)), CLASSES, VAL_SHARE, SPLIT_SEED)
