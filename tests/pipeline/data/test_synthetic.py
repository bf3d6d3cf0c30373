"""Arrays of pixels as a data set: read back as they are, without labels, and told apart from photographs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from maskplan.pipeline.core.artifacts import ImageSet, Preprocessing
from maskplan.pipeline.data.dataset import UNLABELED
from maskplan.pipeline.data.image_sets import identify
from maskplan.pipeline.data.preprocessing import decode
from maskplan.pipeline.data.synthetic import synthetic_count, synthetic_dataset

PLAIN = Preprocessing(3, 6, 6, 0, "bilinear", (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))


def noise(count: int, preprocessing: Preprocessing) -> np.ndarray:
    shape = (count, preprocessing.height, preprocessing.width, preprocessing.channels)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resize": 8},
        {"resize": 9},
        {"resize": 6},
        {"resize": 7, "height": 5, "width": 7},
        {"resize": 11, "interpolation": "bicubic"},
        {"channels": 1, "mean": (0.5,), "std": (0.2,)},
        {"height": 4, "width": 9},
        {"height": 1, "width": 9, "channels": 1, "mean": (0.5,), "std": (0.2,)},
        {"height": 9, "width": 1},
    ],
)
def test_pixels_are_read_back_as_they_are(changes: dict[str, object]) -> None:
    preprocessing = dataclasses.replace(PLAIN, **changes)  # type: ignore[arg-type]
    pixels = noise(3, preprocessing)
    images = synthetic_dataset(pixels, preprocessing, ()).train.images
    for index in range(3):
        assert np.array_equal(decode(images.read(index), preprocessing), pixels[index])


def test_an_eighth_chooses_nothing_is_evaluated_and_nothing_has_a_label() -> None:
    data = synthetic_dataset(noise(32, PLAIN), PLAIN, ("a", "b"))
    assert (len(data.train), len(data.select), len(data.val)) == (28, 4, 0)
    assert sorted([*data.train.indices, *data.select.indices]) == list(range(32))
    assert set(data.train.labels.tolist()) == {UNLABELED}
    assert data.classes == ("a", "b")


def test_records_tell_such_images_from_others() -> None:
    data = synthetic_dataset(noise(32, PLAIN), PLAIN, ())
    sets = tuple(identify(part) for part in (data.train, data.select, data.val))
    assert [s.images for s in sets] == [28, 4, 0]
    photographs = ImageSet("train", 20, "cd" * 32, ("0" * 16,))
    assert synthetic_count((photographs, sets[0])) == 28
    assert synthetic_count(sets) == 32
    assert synthetic_count((photographs, sets[2])) == 0
