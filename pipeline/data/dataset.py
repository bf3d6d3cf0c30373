"""Images with or without classes: folders of them, the seeded `select` part, preprocessed batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.files import read_bytes
from maskplan.pipeline.data.preprocessing import DECODE_ERRORS, decode, normalize

SELECT_SHARE, SELECT_MAX_IMAGES = 0.1, 5000
UNLABELED = -1
"""The label of an image without a class."""

_LOOSE_VAL_SHARE, _LOOSE_VAL_SEED = 0.2, 0
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
_WORKERS = 4


class Images(Protocol):
    """A collection of labeled images; an image is the bytes of its file."""

    @property
    def labels(self) -> npt.NDArray[np.int64]: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> bytes: ...


@dataclass(frozen=True)
class ImageFiles:
    """Image files of a folder, in the order of their names."""

    folder: Path
    names: tuple[str, ...]
    labels: npt.NDArray[np.int64]

    def name(self, index: int) -> str:
        return self.names[index]

    def read(self, index: int) -> bytes:
        return (self.folder / self.names[index]).read_bytes()


@dataclass(frozen=True)
class Split:
    """Part of a collection: `indices` into `images`."""

    role: str
    images: Images
    indices: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return self.images.labels[self.indices]

    def sample(self, count: int, seed: int) -> Split:
        """At most `count` images, drawn with `seed`, in their order; all images where there are no more than `count`."""
        if count >= len(self):
            return self
        drawn = np.random.default_rng(seed).choice(self.indices, count, replace=False)
        return replace(self, indices=np.sort(drawn))


@dataclass(frozen=True)
class Dataset:
    """`train` for learning, `select` for every choice, `val` for the final comparison only."""

    classes: tuple[str, ...]
    train: Split
    select: Split
    val: Split


def open_folder(folder: Path, labels: Sequence[str], outputs: int, seed: int) -> Dataset:
    """Read the tree `train/CLASS/*` and `val/CLASS/*`.

    Args:
        folder: The data folder; a `classes.txt` in it, one folder name per line, sets the order of the classes.
        labels: The model's own class names; they set the order if they are the folders' names.
        outputs: The model's number of outputs.
        seed: For the `select` part, cut from `train`.

    Raises:
        InputError: The folder is missing, empty, has another layout, or does not fit the model.
    """
    train, train_classes = _list_images(folder, "train")
    val, val_classes = _list_images(folder, "val")
    if train_classes != val_classes:
        raise InputError(
            "train and val have different classes",
            where=folder,
            found=f"only in train: {listed(sorted(train_classes - val_classes)) or 'none'};"
            f" only in val: {listed(sorted(val_classes - train_classes)) or 'none'}",
            fix="give every class a folder, with images, in both",
        )
    classes = _class_order(folder, train_classes, labels, outputs)
    return dataset_from_train_val(
        _image_files(folder / "train", train, classes), _image_files(folder / "val", val, classes), classes, seed
    )


def open_val(folder: Path, labels: Sequence[str], outputs: int) -> Split:
    """Only the `val` part, for comparisons; `train/` may be missing.

    Raises:
        InputError: As `open_folder`.
    """
    images, names = _list_images(folder, "val")
    return _all_of("val", _image_files(folder / "val", images, _class_order(folder, names, labels, outputs)))


def open_images(folder: Path, seed: int) -> Dataset:
    """Read images without classes: those below `train/` and `val/`, or, without these two, all images below the folder.

    Folders inside mean nothing, and all labels are `UNLABELED`. Of images in one folder, `val` is the same for every seed.

    Args:
        folder: The data folder.
        seed: For the `select` part.

    Raises:
        InputError: The folder is missing, has only one of the two parts, or too few images.
    """
    if not folder.is_dir():
        raise InputError("data folder not found", where=folder, fix="give --data a folder of images")
    parts = [part for part in ("train", "val") if (folder / part).is_dir()]
    if len(parts) == 1:
        raise InputError(
            f"{parts[0]}/ without {'val' if parts == ['train'] else 'train'}/ in the data folder",
            where=folder,
            fix="give both, or all images in one folder, which is then divided",
        )
    if parts:
        train, held_out = _unlabeled_files(folder / "train"), _unlabeled_files(folder / "val")
        return dataset_from_train_val(train, held_out, (), seed)
    images = _unlabeled_files(folder)
    rest, val = _stratified(images.labels, np.arange(len(images.labels)), _LOOSE_VAL_SHARE, _LOOSE_VAL_SEED)
    kept, select = _stratified(images.labels, rest, SELECT_SHARE, seed)
    return Dataset((), Split("train", images, kept), Split("select", images, select), Split("val", images, val))


def has_class_folders(folder: Path) -> bool:
    """Whether a data folder is divided by classes: there are folders in its `train/` or `val/`, or, without them, in it."""
    parts = [folder / part for part in ("train", "val") if (folder / part).is_dir()] or [folder]
    return any(path.is_dir() for part in parts if part.is_dir() for path in part.iterdir())


def _unlabeled_files(root: Path) -> ImageFiles:
    names = tuple(sorted(path.relative_to(root).as_posix() for path in image_paths(root)))
    if len(names) < 2:
        raise InputError(
            "too few images in the data folder",
            where=root,
            found=f"{len(names)} images",
            fix=f"give images ({', '.join(sorted(_SUFFIXES))})",
        )
    return ImageFiles(root, names, np.full(len(names), UNLABELED, np.int64))


def require_select(select: Split) -> None:
    """Raise if no training image was left for the `select` part.

    Raises:
        InputError: No class has two training images.
    """
    if len(select) == 0:
        raise InputError(
            "too few training images: none is left for the select part, on which choices are measured",
            where="train/",
            found="at most one image in each class",
            fix="give at least 2 training images of a class; of 10 or more in each class, one in ten is set aside",
        )


def dataset_from_train_val(train: Images, val: Images, classes: tuple[str, ...], seed: int) -> Dataset:
    """Split the seeded `select` part off the training images of a collection that has its own held-out part."""
    share = min(SELECT_SHARE, SELECT_MAX_IMAGES / len(train.labels))
    rest, select = _stratified(train.labels, np.arange(len(train.labels)), share, seed)
    return Dataset(classes, Split("train", train, rest), Split("select", train, select), _all_of("val", val))


def split_collection(images: Images, classes: tuple[str, ...], val_share: float, seed: int) -> Dataset:
    """Split a collection without a held-out part into three; each class contributes the same share."""
    rest, val = _stratified(images.labels, np.arange(len(images.labels)), val_share, seed)
    train, select = _stratified(images.labels, rest, SELECT_SHARE, seed + 1)
    return Dataset(classes, Split("train", images, train), Split("select", images, select), Split("val", images, val))


def batches(
    split: Split, preprocessing: Preprocessing, size: int, order: npt.NDArray[np.int64] | None = None
) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
    """Preprocessed batches, decoded in advance by a few threads.

    Args:
        split: Images to read.
        preprocessing: From image files to input tensors.
        size: Images per batch; the last batch may be smaller.
        order: Positions within the split; all images in stored order by default.

    Yields:
        Images (N, channels, H, W) float32 and labels (N,) int64.
    """
    positions = np.arange(len(split)) if order is None else order

    def load_one(index: int) -> npt.NDArray[np.uint8]:
        try:
            return decode(split.images.read(index), preprocessing)
        except DECODE_ERRORS as error:
            fix = "replace or remove this file"
            raise InputError("cannot read an image", where=split.images.name(index), found=error, fix=fix) from error

    def load(chunk: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return np.stack([load_one(int(i)) for i in split.indices[chunk]])

    chunks = [positions[start : start + size] for start in range(0, len(positions), size)]
    with ThreadPoolExecutor(_WORKERS) as pool:
        # As many batches in flight as there are workers: bounds memory for a consumer that is slower than decoding.
        pending = [pool.submit(load, chunk) for chunk in chunks[:_WORKERS]]
        for i, chunk in enumerate(chunks):
            if i + _WORKERS < len(chunks):
                pending.append(pool.submit(load, chunks[i + _WORKERS]))
            yield normalize(pending.pop(0).result(), preprocessing), split.labels[chunk]


def _list_images(folder: Path, part: str) -> tuple[list[tuple[str, str]], set[str]]:
    """All pairs of a class and a path relative to the part, and the class names."""
    root = folder / part
    if not folder.is_dir():
        raise InputError(
            "data folder not found", where=folder, fix="give --data a folder with train/CLASS/ and val/CLASS/"
        )
    if not root.is_dir():
        contents = listed(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise InputError(
            f"no {part}/ in the data folder",
            where=folder,
            found=contents,
            fix="arrange it as train/CLASS/*.jpg and val/CLASS/*.jpg",
        )
    images: list[tuple[str, str]] = []
    empty = []
    for class_folder in sorted(p for p in root.iterdir() if p.is_dir()):
        files = sorted(image_paths(class_folder))
        if not files:
            empty.append(class_folder.name)
        images += [(class_folder.name, p.relative_to(root).as_posix()) for p in files]
    if not images or empty:
        loose = sum(p.suffix.lower() in _SUFFIXES for p in root.iterdir())
        contents = (
            f"class folders without images: {listed(empty)}" if empty else f"no class folders and {loose} loose images"
        )
        raise InputError(
            f"{part}/ contains no images in class folders" if not images else f"some classes of {part}/ are empty",
            where=root,
            found=contents,
            fix=f"one folder per class: {part}/CLASS/*.jpg",
        )
    return images, {name for name, _ in images}


def image_paths(folder: Path) -> Iterator[Path]:
    """Image files below a folder, in linked folders too, as torchvision's ImageFolder finds them."""
    for root, folders, files in os.walk(folder, followlinks=True):
        # A link to a folder that contains it would be walked for ever.
        above = {Path(root).resolve(), *Path(root).resolve().parents}
        folders[:] = [name for name in folders if (Path(root) / name).resolve() not in above]
        for name in files:
            path = Path(root) / name
            if path.suffix.lower() in _SUFFIXES and path.is_file():
                yield path


def _read_lines(path: Path) -> list[str]:
    try:
        return read_bytes(path).decode().splitlines()
    except UnicodeDecodeError as error:
        raise InputError("not a text file", where=path, found=error, fix="save it as UTF-8") from error


def _class_order(folder: Path, names: set[str], labels: Sequence[str], outputs: int) -> tuple[str, ...]:
    listing = folder / "classes.txt"
    if listing.is_file():
        order = tuple(line.strip() for line in _read_lines(listing) if line.strip())
        if set(order) != names or len(order) != len(names):
            unlisted, missing = sorted(names - set(order)), sorted(set(order) - names)
            raise InputError(
                "classes.txt does not name the class folders",
                where=listing,
                found=f"not listed: {listed(unlisted) or 'none'}; without a folder: {listed(missing) or 'none'}",
                fix="write one folder name per line, each once",
            )
    elif set(labels) == names:
        order = tuple(labels)
    else:
        order = tuple(sorted(names))
    if len(order) != outputs:
        raise InputError(
            "the data and the model have different numbers of classes",
            where=folder,
            found=f"{len(order)} class folders, {outputs} model outputs",
            fix=f"give a model with {len(order)} outputs (--classes {len(order)}), or the data it was trained for",
        )
    return order


def _image_files(root: Path, images: list[tuple[str, str]], classes: tuple[str, ...]) -> ImageFiles:
    index = {name: i for i, name in enumerate(classes)}
    return ImageFiles(root, tuple(p for _, p in images), np.array([index[c] for c, _ in images], dtype=np.int64))


def _all_of(role: str, images: Images) -> Split:
    return Split(role, images, np.arange(len(images.labels)))


def _stratified(
    labels: npt.NDArray[np.int64], indices: npt.NDArray[np.int64], share: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split off `share` of every class, at least one image of a class that has two; both parts keep the order."""
    generator = np.random.default_rng(seed)
    chosen: list[int] = []
    for label in np.unique(labels[indices]):
        members = indices[labels[indices] == label]
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        chosen += generator.choice(members, count, replace=False).tolist()
    split_off = np.array(sorted(chosen), dtype=np.int64)
    return np.setdiff1d(indices, split_off), split_off
