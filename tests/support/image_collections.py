"""Images that were never files."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
from PIL import Image

from maskplan.pipeline.data.dataset import Split


@dataclasses.dataclass(frozen=True)
class InMemory:
    """Images that were never files."""

    files: tuple[bytes, ...]
    labels: np.ndarray[Any, np.dtype[np.int64]]

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> bytes:
        return self.files[index]


def encoded(seed: int, kind: str = "PNG", size: tuple[int, int] = (20, 20)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def in_memory(count: int, first: int = 0) -> InMemory:
    return InMemory(tuple(encoded(first + i, "BMP", (4, 4)) for i in range(count)), np.arange(count) % 3)


def whole(images: InMemory, role: str = "train") -> Split:
    return Split(role, images, np.arange(len(images.labels)))
