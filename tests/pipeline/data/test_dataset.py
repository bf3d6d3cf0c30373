"""Class folders, the `select` part, digests and batches."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_collections import InMemory, encoded
from PIL import Image
from torchvision.datasets import ImageFolder

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import (
    SELECT_MAX_IMAGES,
    Dataset,
    ImageFiles,
    batches,
    dataset_from_train_val,
    open_folder,
    open_val,
    split_collection,
)
from maskplan.pipeline.data.preprocessing import decode, normalize

PREPROCESSING = Preprocessing(3, 16, 16, 18, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
NAMES = ("blue", "green", "red")


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[Mapping[str, int]], Path]:
    """Make folders with so many images each, by path below the data folder."""

    def make(counts: Mapping[str, int]) -> Path:
        root = tmp_path / "data"
        for i, (folder, count) in enumerate(counts.items()):
            (root / folder).mkdir(parents=True)
            for n in range(count):
                (root / folder / f"{n:03}.png").write_bytes(encoded(1000 * i + n))
        return root

    return make


@pytest.fixture
def copied(toy_data: Path, tmp_path: Path) -> Path:
    """A copy of the toy data, to modify."""
    return Path(shutil.copytree(toy_data, tmp_path / "toy"))


def test_a_tree_is_read_as_torchvision_reads_it(toy_data: Path) -> None:
    data = open_folder(toy_data, (), 3, seed=0)
    for split, part in ((data.val, "val"), (data.train, "train")):
        theirs = ImageFolder(toy_data / part)
        assert data.classes == tuple(theirs.classes)
        images = split.images
        assert isinstance(images, ImageFiles)
        assert [(str(images.folder / n), int(c)) for n, c in zip(images.names, images.labels, strict=True)] == (
            theirs.samples
        )


def test_train_and_select_share_the_training_images_and_val_is_separate(toy_data: Path) -> None:
    data = open_folder(toy_data, (), 3, seed=0)
    assert (len(data.train), len(data.select), len(data.val)) == (54, 6, 24)
    assert sorted([*data.train.indices, *data.select.indices]) == list(range(60))
    assert np.bincount(data.select.labels).tolist() == [2, 2, 2]
    assert [split.role for split in (data.train, data.select, data.val)] == ["train", "select", "val"]


def test_select_is_seeded(toy_data: Path) -> None:
    first, again, other = (open_folder(toy_data, (), 3, seed=s).select.indices.tolist() for s in (1, 1, 2))
    assert first == again != other


def test_select_keeps_the_share_of_each_class_and_leaves_each_an_image(
    tree: Callable[[Mapping[str, int]], Path],
) -> None:
    root = tree({"train/a": 40, "train/b": 9, "train/c": 2, "train/d": 1, **{f"val/{c}": 1 for c in "abcd"}})
    data = open_folder(root, (), 4, seed=0)
    assert np.bincount(data.select.labels, minlength=4).tolist() == [4, 1, 1, 0]
    assert np.bincount(data.train.labels, minlength=4).tolist() == [36, 8, 1, 1]


def test_select_is_a_few_thousand_images_of_a_large_set() -> None:
    labels = np.repeat(np.arange(100), 1300)
    images = ImageFiles(Path(), tuple(map(str, range(len(labels)))), labels)
    data = dataset_from_train_val(images, images, tuple(map(str, range(100))), 0)
    select, rest = data.select.indices, data.train.indices
    assert len(select) == SELECT_MAX_IMAGES
    assert np.bincount(labels[select]).tolist() == [SELECT_MAX_IMAGES // 100] * 100
    assert len(np.union1d(select, rest)) == len(labels) == len(select) + len(rest)


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_split_collection_gives_three_parts_without_loss(labels: list[int], seed: int) -> None:
    images = InMemory((b"",) * len(labels), np.array(labels))
    data = split_collection(images, ("a", "b", "c", "d", "e"), 0.2, seed)
    parts = [data.train.indices, data.select.indices, data.val.indices]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert all(np.array_equal(part, np.sort(part)) for part in parts)
    for label in set(labels):
        assert (data.train.labels == label).any()
        assert (data.val.labels == label).any() == (labels.count(label) > 1)


def test_other_files_are_ignored_and_subfolders_are_read(copied: Path) -> None:
    (copied / "val" / "red" / "notes.txt").write_text("hello")
    (copied / "val" / "red" / "deep").mkdir()
    (copied / "val" / "red" / "deep" / "x.JPEG").write_bytes(encoded(1, "JPEG"))
    (copied / "val" / "readme.md").write_text("hello")
    val = open_val(copied, (), 3)
    assert len(val) == 25
    assert val.images.name(22) == "red/06.png"
    assert "red/deep/x.JPEG" in [val.images.name(i) for i in range(25)]
    assert val.labels[[val.images.name(i) for i in range(25)].index("red/deep/x.JPEG")] == 2


def test_open_val_reads_no_train(toy_data: Path, copied: Path) -> None:
    shutil.rmtree(copied / "train")
    val = open_val(copied, (), 3)
    assert val.labels.tolist() == open_folder(toy_data, (), 3, seed=0).val.labels.tolist()


def test_the_error_for_a_missing_folder_names_the_expected_layout(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data folder not found") as raised:
        open_folder(tmp_path / "none", (), 3, seed=0)
    assert raised.value.where == tmp_path / "none"
    assert "train/CLASS/" in str(raised.value.fix)


def test_a_file_is_refused_as_a_data_folder(tmp_path: Path) -> None:
    (tmp_path / "data.zip").touch()
    with pytest.raises(InputError, match="data folder not found"):
        open_folder(tmp_path / "data.zip", (), 3, seed=0)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_missing_part_is_named_with_the_folders_that_exist(copied: Path, part: str) -> None:
    (copied / part).rename(copied / "other")
    with pytest.raises(InputError, match=f"no {part}/ in the data folder") as raised:
        open_folder(copied, (), 3, seed=0)
    assert "other" in str(raised.value.found)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no train/") as raised:
        open_folder(tmp_path, (), 3, seed=0)
    assert raised.value.found == "nothing"


def test_loose_images_are_counted(tree: Callable[[Mapping[str, int]], Path]) -> None:
    root = tree({"train": 5, "val/a": 1})
    with pytest.raises(InputError, match="train/ contains no images in class folders") as raised:
        open_folder(root, (), 1, seed=0)
    assert "no class folders and 5 loose images" in str(raised.value.found)


def test_empty_classes_are_named(tree: Callable[[Mapping[str, int]], Path]) -> None:
    root = tree({"train/a": 2, "train/b": 0, "train/c": 0, "val/a": 1})
    with pytest.raises(InputError, match="some classes of train/ are empty") as raised:
        open_folder(root, (), 3, seed=0)
    assert "b, c" in str(raised.value.found)


def test_only_empty_classes_are_refused(tree: Callable[[Mapping[str, int]], Path]) -> None:
    root = tree({"train/a": 0, "val/a": 1})
    with pytest.raises(InputError, match="train/ contains no images"):
        open_folder(root, (), 1, seed=0)


def test_classes_of_one_part_only_are_named(tree: Callable[[Mapping[str, int]], Path]) -> None:
    root = tree({"train/a": 2, "train/b": 2, "val/a": 1, "val/c": 1})
    with pytest.raises(InputError, match="different classes") as raised:
        open_folder(root, (), 2, seed=0)
    assert raised.value.found == "only in train: b; only in val: c"


@pytest.mark.parametrize("outputs", [2, 1000])
def test_a_count_that_does_not_match_the_outputs_is_an_error(toy_data: Path, outputs: int) -> None:
    for opened in (lambda: open_folder(toy_data, (), outputs, seed=0), lambda: open_val(toy_data, (), outputs)):
        with pytest.raises(InputError, match="different numbers of classes") as raised:
            opened()
        assert raised.value.found == f"3 class folders, {outputs} model outputs"
        assert "--classes 3" in str(raised.value.fix)


def numbers_by_class(data: Dataset) -> dict[str, int]:
    images = data.val.images
    return {images.name(i).split("/")[0]: int(label) for i, label in enumerate(images.labels)}


def test_classes_are_sorted_by_name_by_default(toy_data: Path) -> None:
    data = open_folder(toy_data, (), 3, seed=0)
    assert data.classes == NAMES
    assert numbers_by_class(data) == {"blue": 0, "green": 1, "red": 2}


def test_the_models_labels_set_the_order_if_they_name_the_folders(toy_data: Path) -> None:
    data = open_folder(toy_data, ("red", "blue", "green"), 3, seed=0)
    assert data.classes == ("red", "blue", "green")
    assert numbers_by_class(data) == {"red": 0, "blue": 1, "green": 2}


def test_labels_that_are_not_the_folders_names_are_ignored(toy_data: Path) -> None:
    assert open_folder(toy_data, ("rouge", "bleu", "vert"), 3, seed=0).classes == NAMES


def test_classes_txt_overrides_the_order_of_the_labels(copied: Path) -> None:
    (copied / "classes.txt").write_text("green\n\n  red \nblue\n")
    data = open_folder(copied, ("red", "blue", "green"), 3, seed=0)
    assert data.classes == ("green", "red", "blue")
    assert numbers_by_class(data) == {"green": 0, "red": 1, "blue": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("green\nred\n", "not listed: blue; without a folder: none"),
        ("green\nred\nblue\npink\n", "not listed: none; without a folder: pink"),
        ("green\nred\nbleu\n", "not listed: blue; without a folder: bleu"),
        ("green\nred\nblue\nred\n", "not listed: none; without a folder: none"),
        ("", "not listed: blue, green, red; without a folder: none"),
    ],
)
def test_a_classes_txt_that_does_not_name_the_folders_is_an_error(copied: Path, text: str, message: str) -> None:
    (copied / "classes.txt").write_text(text)
    with pytest.raises(InputError, match=r"classes\.txt does not name") as raised:
        open_folder(copied, (), 3, seed=0)
    assert (raised.value.where, raised.value.found) == (copied / "classes.txt", message)


def test_a_classes_txt_that_is_not_utf8_is_an_error(copied: Path) -> None:
    (copied / "classes.txt").write_bytes("grün\nblue\nred\n".encode("latin-1"))
    with pytest.raises(InputError) as raised:
        open_folder(copied, (), 3, seed=0)
    assert raised.value.where == copied / "classes.txt"


@pytest.mark.parametrize("size", [1, 7, 24, 100])
@pytest.mark.parametrize("seed", [None, 3])
def test_batches_are_what_decoding_one_by_one_gives(toy_data: Path, size: int, seed: int | None) -> None:
    split = open_val(toy_data, (), 3)
    order = None if seed is None else np.random.default_rng(seed).permutation(24)[:20]
    positions = list(range(24)) if order is None else order.tolist()
    got = list(batches(split, PREPROCESSING, size, order))
    lengths = [size] * (len(positions) // size) + ([len(positions) % size] if len(positions) % size else [])
    assert [len(x) for x, _ in got] == [len(labels) for _, labels in got] == lengths
    images = np.concatenate([x for x, _ in got])
    assert images.dtype == np.float32
    assert images.shape[1:] == (3, 16, 16)
    for image, position in zip(images, positions, strict=True):
        assert np.array_equal(
            image, normalize(decode(split.images.read(position), PREPROCESSING)[None], PREPROCESSING)[0]
        )
    assert np.concatenate([labels for _, labels in got]).tolist() == split.labels[positions].tolist()


def test_positions_are_within_the_split_not_the_collection(toy_data: Path) -> None:
    select = open_folder(toy_data, (), 3, seed=0).select
    ((x, labels),) = batches(select, PREPROCESSING, 10, np.array([5, 0]))
    assert labels.tolist() == [select.labels[5], select.labels[0]]
    for image, index in zip(x, select.indices[[5, 0]], strict=True):
        assert np.array_equal(
            image, normalize(decode(select.images.read(int(index)), PREPROCESSING)[None], PREPROCESSING)[0]
        )


def test_no_images_give_no_batches(toy_data: Path) -> None:
    assert list(batches(open_val(toy_data, (), 3), PREPROCESSING, 4, np.array([], dtype=np.int64))) == []


def test_linked_folders_are_followed_and_a_loop_ends(copied: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (copied / "val" / "red").rename(elsewhere)
    (copied / "val" / "red").symlink_to(elsewhere)
    deeper = copied / "val" / "blue" / "more"
    deeper.symlink_to(elsewhere)
    (copied / "val" / "green" / "loop").symlink_to(copied / "val" / "green")
    split = open_val(copied, (), 3)
    assert len(split) == 8 + 16 + 8
    expected = ImageFolder(str(copied / "val"), is_valid_file=lambda name: "loop" not in name)
    names = [str(Path(path).relative_to(copied / "val")) for path, _ in expected.samples]
    assert [split.images.name(int(i)) for i in split.indices] == names


def test_an_image_that_cannot_be_read_is_named(copied: Path) -> None:
    (copied / "val" / "blue" / "03.png").write_bytes(b"<html>404</html>")
    with pytest.raises(InputError, match="cannot read an image") as raised:
        list(batches(open_val(copied, (), 3), PREPROCESSING, 8))
    assert raised.value.where == "blue/03.png"


def test_an_image_of_billions_of_pixels_after_resizing_is_refused(copied: Path) -> None:
    Image.new("RGB", (1, 30_000)).save(copied / "val" / "blue" / "03.png")
    preprocessing = dataclasses.replace(PREPROCESSING, resize=256)
    with pytest.raises(InputError, match="after resizing the shorter side to 256") as raised:
        list(batches(open_val(copied, (), 3), preprocessing, 8))
    assert raised.value.where == "blue/03.png"


def test_batches_can_be_closed_early(toy_data: Path) -> None:
    stream = batches(open_val(toy_data, (), 3), PREPROCESSING, 2)
    assert len(next(stream)[0]) == 2
    stream.close()  # type: ignore[attr-defined]
    with pytest.raises(StopIteration):
        next(stream)


def test_sample_draws_seeded_images_in_order(toy_data: Path) -> None:
    val = open_val(toy_data, (), 3)
    drawn = val.sample(10, seed=1)
    assert len(drawn) == 10
    assert drawn.indices.tolist() == sorted(set(drawn.indices.tolist())) == val.sample(10, seed=1).indices.tolist()
    assert drawn.indices.tolist() != val.sample(10, seed=2).indices.tolist()
    assert set(drawn.indices) <= set(val.indices)
    assert drawn.role == "val"


def test_a_sample_of_more_images_than_exist_is_all_of_them(toy_data: Path) -> None:
    val = open_val(toy_data, (), 3)
    assert val.sample(24, seed=0).indices.tolist() == val.sample(999, seed=5).indices.tolist() == list(range(24))
