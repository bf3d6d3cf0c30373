"""From image files to input tensors by a `Preprocessing` record, with the arithmetic of torchvision's transforms."""

from __future__ import annotations

import io
import struct
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from maskplan.pipeline.core.artifacts import Preprocessing

IMAGENET = Preprocessing(3, 224, 224, 256, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for bytes that are not an image."""

MAX_PIXELS = 100_000_000
"""Of an image in its file and after resizing: 300 MB in RGB, more than any camera's."""

# Pillow's own limit is lower and a warning; ours is an error that names the image.
Image.MAX_IMAGE_PIXELS = None

_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
INTERPOLATIONS = tuple(_RESAMPLING)


def decode(data: bytes, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Decode, resize and crop one image file.

    Returns:
        (height, width, channels), uint8.

    Raises:
        One of `DECODE_ERRORS`: The bytes are not a complete image.
    """
    with Image.open(io.BytesIO(data)) as opened:
        _require_reasonable(opened.size, "in the file")
        # Pillow warns about transparency in a palette unless it becomes a channel first; the colors are the same.
        opaque = opened.convert("RGBA") if opened.mode == "P" and "transparency" in opened.info else opened
        image = opaque.convert("RGB" if preprocessing.channels == 3 else "L")
    return resize_and_crop(image, preprocessing)


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Resize and crop a decoded image to (height, width, channels), uint8."""
    resampling = _RESAMPLING[preprocessing.interpolation]
    if preprocessing.resize == 0:
        image = (
            image
            if image.size == (preprocessing.width, preprocessing.height)
            else image.resize((preprocessing.width, preprocessing.height), resampling)
        )
    else:
        short, long = sorted(image.size)
        scaled = int(preprocessing.resize * long / short)
        size = (preprocessing.resize, scaled) if image.width <= image.height else (scaled, preprocessing.resize)
        _require_reasonable(size, f"after resizing the shorter side to {preprocessing.resize}")
        image = image if image.size == size else image.resize(size, resampling)
        left, top = _margin(image.width, preprocessing.width), _margin(image.height, preprocessing.height)
        image = image.crop((left, top, left + preprocessing.width, top + preprocessing.height))
    return np.asarray(image, dtype=np.uint8).reshape(preprocessing.height, preprocessing.width, preprocessing.channels)


def _require_reasonable(size: tuple[int, int], where: str) -> None:
    """A file of 200 bytes can have billions of pixels, in itself or after resizing.

    Raises:
        ValueError: More than `MAX_PIXELS`.
    """
    width, height = size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width:,} x {height:,} pixels {where}; at most {MAX_PIXELS:,} pixels are read")


def _margin(size: int, crop: int) -> int:
    """Start of a centered crop, negative for one that is padded with black; rounded as in torchvision's CenterCrop."""
    return -((crop - size) // 2) if crop > size else round((size - crop) / 2)


def normalize(images: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """(N, H, W, channels) uint8 to (N, channels, H, W) float32: scaled to [0, 1], then (x - mean) / std."""
    scaled = images.transpose(0, 3, 1, 2).astype(np.float32)
    scaled /= 255
    scaled -= np.asarray(preprocessing.mean, np.float32).reshape(-1, 1, 1)
    scaled /= np.asarray(preprocessing.std, np.float32).reshape(-1, 1, 1)
    return np.ascontiguousarray(scaled)


def inspect_image(data: bytes) -> Literal["8-bit", "16-bit"] | None:
    """The depth of an image file that decodes to its end, or None if it does not.

    A JPEG is decoded at an eighth of its size, which is faster and sufficient.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            _require_reasonable(image.size, "in the file")
            image.draft("RGB", (max(image.width // 8, 1), max(image.height // 8, 1)))
            image.load()
            return "16-bit" if image.mode.startswith("I") else "8-bit"
    except DECODE_ERRORS:
        return None


def preprocessing_from_transforms(transforms: Any, channels: int = 3) -> Preprocessing:
    """The record of a torchvision weights enum's `transforms()`."""
    crop, resize = transforms.crop_size[0], transforms.resize_size[0]
    return Preprocessing(
        channels=channels,
        height=crop,
        width=crop,
        resize=resize,
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )
