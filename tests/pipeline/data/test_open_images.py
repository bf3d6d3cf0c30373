"""Folders of images without classes, for networks without classes and for what needs no labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import Dataset, Split, open_images
from maskplan.pipeline.data.source import find_dataset, find_val


def pictures(folder: Path, count: int, name: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / f"{name}{i:02}.png")


def names(part: Split) -> list[str]:
    return [part.images.name(i) for i in part.indices.tolist()]


def parts(data: Dataset) -> list[Split]:
    return [data.train, data.select, data.val]


def test_loose_images_are_divided_into_three_parts_and_val_is_the_same_for_every_seed(tmp_path: Path) -> None:
    pictures(tmp_path, 40)
    first, second = (open_images(tmp_path, seed) for seed in (0, 1))
    assert [len(part) for part in parts(first)] == [29, 3, 8]
    everything = [name for part in parts(first) for name in names(part)]
    assert sorted(everything) == [f"{i:02}.png" for i in range(40)]
    assert names(first.val) == names(second.val)
    assert names(first.select) != names(second.select)
    assert [set(part.labels.tolist()) for part in parts(first)] == [{-1}] * 3
    assert first.classes == ()


def test_train_and_val_are_taken_as_they_are_and_folders_in_them_mean_nothing(tmp_path: Path) -> None:
    pictures(tmp_path / "train", 10, "loose")
    pictures(tmp_path / "train" / "more", 10)
    pictures(tmp_path / "val", 3)
    data = open_images(tmp_path, 0)
    assert len(data.train) + len(data.select) == 20
    assert names(data.val) == ["00.png", "01.png", "02.png"]
    assert "more/00.png" in names(data.train) + names(data.select)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: None, "too few images"),
        (lambda folder: pictures(folder, 1), "too few images"),
        (lambda folder: pictures(folder / "train", 5), "train/ without val/"),
        (lambda folder: pictures(folder / "val", 5), "val/ without train/"),
    ],
)
def test_a_folder_that_cannot_be_divided_is_refused(tmp_path: Path, make: object, told: str) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(InputError, match=told):
        open_images(tmp_path, 0)
    with pytest.raises(InputError, match="not found"):
        open_images(tmp_path / "nowhere", 0)


def test_a_network_without_classes_takes_any_folder(toy_data: Path) -> None:
    data = find_dataset(toy_data, model="net", labels=(), outputs=0, seed=0)
    assert data is not None
    assert (len(data.train) + len(data.select), len(data.val)) == (60, 24)
    assert np.all(data.train.labels == -1)
    val = find_val(toy_data, model="net", labels=(), outputs=0)
    assert val is not None
    assert names(val) == names(data.val)


def test_a_classifier_takes_unlabeled_images_only_where_no_labels_are_needed(toy_data: Path, tmp_path: Path) -> None:
    pictures(tmp_path / "train", 10)
    pictures(tmp_path / "val", 4)
    with pytest.raises(InputError, match="no images in class folders"):
        find_dataset(tmp_path, model="net", labels=(), outputs=3, seed=0)
    loose = find_dataset(tmp_path, model="net", labels=(), outputs=3, seed=0, needs_classes=False)
    assert loose is not None
    assert set(loose.val.labels.tolist()) == {-1}
    labeled = find_dataset(toy_data, model="net", labels=(), outputs=3, seed=0, needs_classes=False)
    assert labeled is not None
    assert set(labeled.val.labels.tolist()) == {0, 1, 2}
    with pytest.raises(InputError, match="different numbers of classes"):
        find_dataset(toy_data, model="net", labels=(), outputs=4, seed=0, needs_classes=False)
