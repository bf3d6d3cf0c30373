"""The images that ranges are measured on."""

from __future__ import annotations

import io
import logging
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskplan.calibration.batches import calibration_batches, choose_images
from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import Split

GREY = Preprocessing(1, 4, 4, 0, "bilinear", (0.5,), (0.25,))


@dataclass(frozen=True)
class Flat:
    """Images of one gray value each."""

    labels: npt.NDArray[np.int64]

    def name(self, index: int) -> str:
        return f"{index}.png"

    def read(self, index: int) -> bytes:
        file = io.BytesIO()
        Image.new("L", (4, 4), index % 256).save(file, "png")
        return file.getvalue()


def split_of(labels: list[int], indices: list[int] | None = None) -> Split:
    held = np.arange(len(labels)) if indices is None else np.asarray(indices)
    return Split("train", Flat(np.asarray(labels, np.int64)), held)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 80), st.integers(0, 5))
def test_classes_give_as_many_images_as_the_others_or_all_they_have(labels: list[int], count: int, seed: int) -> None:
    split = split_of(labels)
    chosen = choose_images(split, count, seed)
    assert len(chosen) == min(count, len(split))
    assert len(set(chosen.indices.tolist())) == len(chosen)
    have, taken = Counter(labels), Counter(chosen.labels.tolist())
    for one, other in ((a, b) for a in have for b in have):
        # One class may be a round behind another, unless it has no more.
        assert taken[one] >= min(have[one], taken[other] - 1)


def test_the_draw_is_of_the_seed() -> None:
    split = split_of([0, 1] * 100)
    first, again, other = (choose_images(split, 20, seed).indices.tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_only_the_splits_own_images_are_drawn() -> None:
    split = split_of([0, 1] * 50, indices=list(range(10, 30)))
    assert set(choose_images(split, 15, 0).indices.tolist()) <= set(range(10, 30))


def test_images_are_prepared_as_the_checkpoint_wants() -> None:
    found = list(calibration_batches(split_of([0, 1, 0], indices=[0, 2]), GREY, 1))
    assert [f.shape for f in found] == [(1, 1, 4, 4)] * 2
    assert found[0][0, 0, 0, 0] == pytest.approx((0 - 0.5) / 0.25)
    assert found[1][0, 0, 0, 0] == pytest.approx((2 / 255 - 0.5) / 0.25)


def test_no_images_are_refused() -> None:
    with pytest.raises(InputError, match="no images to calibrate on"):
        choose_images(split_of([0, 1], indices=[]), 4, 0)


@pytest.mark.parametrize(("labels", "warned"), [([3] * 8, True), ([3] * 7 + [4], False)])
def test_images_of_one_class_only_are_warned_of(
    labels: list[int], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        choose_images(split_of(labels), 4, 0)
    assert ("one class" in caplog.text) == warned
