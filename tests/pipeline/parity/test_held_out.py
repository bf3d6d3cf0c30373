"""A dense network that was trained on `select` is noticed; one that was not is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.data.dataset import Dataset, Split
from maskplan.pipeline.parity.held_out import held_out_note

PREPROCESSING = Preprocessing(3, 1, 1, 0, "nearest", (0.0,) * 3, (1.0,) * 3)


class Remembering:
    """Ten classes of images that hold their own label in red; right where green says so."""

    def logits(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        labels = np.round(images[:, 0, 0, 0] * 255).astype(int)
        right = images[:, 1, 0, 0] > 0.5
        return np.eye(10, dtype=np.float32)[np.where(right, labels, (labels + 1) % 10)]


class Pixels:
    """Images of one pixel as PPM bytes."""

    def __init__(self, count: int, accuracy: float, seed: int) -> None:
        self.labels = np.arange(count) % 10
        self.right = np.random.default_rng(seed).random(count) < accuracy

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> bytes:
        return b"P6 1 1 255\n" + bytes([int(self.labels[index]), 255 * int(self.right[index]), 0])


def data_of(train: float, select: float, val: float, count: int = 400) -> Dataset:
    parts = (
        Split(role, Pixels(count, accuracy, seed), np.arange(count))
        for seed, (role, accuracy) in enumerate((("train", train), ("select", select), ("val", val)))
    )
    return Dataset(tuple("0123456789"), *parts)


@pytest.mark.parametrize(
    ("train", "select", "val", "noticed"),
    [
        (0.96, 0.955, 0.88, True),
        (1.0, 1.0, 0.9, True),
        (0.95, 0.86, 0.86, False),
        (0.99, 0.88, 0.88, False),
        (1.0, 1.0, 1.0, False),
        (0.9, 0.9, 0.89, False),
        (0.99, 0.94, 0.70, False),
    ],
)
def test_select_that_is_as_easy_as_train_and_easier_than_val_is_noticed(
    train: float, select: float, val: float, noticed: bool
) -> None:
    data, model = data_of(train, select, val), Remembering()
    note = held_out_note(model, PREPROCESSING, data, 100 * val)  # type: ignore[arg-type]
    assert (note is not None) == noticed
    if note is not None:
        assert "not held out" in note


def test_without_images_nothing_is_said() -> None:
    empty: Any = Dataset((), *(Split(role, Pixels(0, 1.0, 0), np.arange(0)) for role in ("train", "select", "val")))
    assert held_out_note(Remembering(), PREPROCESSING, empty, 50.0) is None  # type: ignore[arg-type]
