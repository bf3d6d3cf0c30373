"""Moved and mirrored images, against a search over all moves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.augmentation import AUGMENTATIONS, augment_images, require_augmentation

HOW = Preprocessing(3, 16, 24, 0, "bilinear", (0.5, 0.25, 0.1), (0.5, 0.5, 0.2))
BLACK = np.array([-1.0, -0.5, -0.5], np.float32)


def images(count: int = 40) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(count, 3, 16, 24)).astype(np.float32)


def candidates(image: npt.NDArray[np.float32], kind: str) -> list[npt.NDArray[np.float32]]:
    """Everything that may become of an image, by padding and cutting."""
    moves, _, flips = kind.partition("+")
    if moves == "shift":
        padded = np.pad(image, ((0, 0), (2, 2), (3, 3)), mode="edge")
    else:
        padded = np.tile(BLACK[:, None, None], (1, 20, 30))
        padded[:, 2:-2, 3:-3] = image
    cut = [padded[:, top : top + 16, left : left + 24] for top in range(5) for left in range(7)]
    return cut + ([c[:, :, ::-1] for c in cut] if flips else [])


@pytest.mark.parametrize("kind", [k for k in AUGMENTATIONS if k != "none"])
def test_each_image_is_one_of_its_moves_and_all_moves_come(kind: str) -> None:
    x = images(200)
    found = augment_images(x, kind, HOW, 3)
    assert found.dtype == np.float32
    assert found.flags["C_CONTIGUOUS"]
    drawn = []
    for before, after in zip(x, found, strict=True):
        equal = [i for i, c in enumerate(candidates(before, kind)) if np.allclose(c, after)]
        assert len(equal) == 1
        drawn += equal
    assert len(set(drawn)) > 0.9 * min(len(candidates(x[0], kind)), 60)


def test_none_is_nothing_and_the_seed_decides() -> None:
    x = images()
    assert augment_images(x, "none", HOW, 1) is x
    assert np.array_equal(augment_images(x, "crop+flip", HOW, 1), augment_images(x, "crop+flip", HOW, 1))
    assert not np.array_equal(augment_images(x, "crop+flip", HOW, 1), augment_images(x, "crop+flip", HOW, 2))
    assert np.array_equal(x, images())


def test_another_name_is_refused() -> None:
    with pytest.raises(InputError, match="crop\\+flip"):
        require_augmentation("cutout")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_the_strides_are_those_of_contiguous_images(kind: str, channels: int) -> None:
    """PyTorch chooses the order of features by them, and networks that view features need this one."""
    preprocessing = Preprocessing(channels, 8, 8, 0, "bilinear", (0.5,) * channels, (0.25,) * channels)
    images = np.zeros((2, channels, 8, 8), np.float32)
    assert augment_images(images, kind, preprocessing, 0).strides == (256 * channels, 256, 32, 4)
