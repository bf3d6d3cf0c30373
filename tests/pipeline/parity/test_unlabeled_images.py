"""Folders of images without classes."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from maskplan.pipeline.parity.unlabeled_images import open_unlabeled


def pictures(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (4, 4)).save(folder / name, "PNG")


@pytest.mark.parametrize("part", ["", "val"])
def test_loose_images_are_found_in_order_and_have_no_label(part: str, tmp_path: Path) -> None:
    pictures(tmp_path / part, "b.png", "a.PNG", "c.jpg")
    (tmp_path / part / "notes.txt").write_text("no image")
    (tmp_path / part / "paper.pdf").write_text("Pillow writes these and cannot open them")
    found = open_unlabeled(tmp_path)
    assert found is not None
    assert [found.images.name(i) for i in found.indices.tolist()] == ["a.PNG", "b.png", "c.jpg"]
    assert found.labels.tolist() == [-1, -1, -1]
    assert found.images.read(1) == (tmp_path / part / "b.png").read_bytes()


@pytest.mark.parametrize("name", ["val/cat/a.png", "cat/a.png", "train/cat/a.png"])
def test_class_folders_are_left_to_the_reader_of_class_folders(name: str, tmp_path: Path) -> None:
    """Also where loose images lie beside them: that is a mistake in the layout."""
    pictures((tmp_path / name).parent, "a.png")
    pictures((tmp_path / name).parents[1], "loose.png")
    assert open_unlabeled(tmp_path) is None


def test_no_folder_and_a_folder_without_images_are_no_unlabeled_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("")
    assert open_unlabeled(tmp_path / "nowhere") is None
    assert open_unlabeled(tmp_path / "empty") is None
