"""Labeled images: class folders or the bundled digits, their seeded `select` part, and the digests that tell sets apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import ImageSet, Preprocessing
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.files import read_bytes
from maskplan.pipeline.data.preprocessing import decode, is_whole, normalize

SKETCH_SIZE = 512
SELECT_SHARE, SELECT_MOST = 0.1, 5000
_EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
_WORKERS = 4
_KEEP_DECODED_BYTES = 512 * 2**20


class Images(Protocol):
    """A labeled collection; an image is the bytes of its file."""

    @property
    def labels(self) -> npt.NDArray[np.int64]: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> bytes: ...


@dataclass(frozen=True)
class ImageFiles:
    """Image files of a class-folder tree, in the order of their names."""

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

    def first(self, count: int, seed: int) -> Split:
        """At most `count` images, drawn with `seed`; all of them in order when there are no more."""
        if count >= len(self):
            return self
        drawn = np.random.default_rng(seed).choice(self.indices, count, replace=False)
        return replace(self, indices=np.sort(drawn))


@dataclass(frozen=True)
class Dataset:
    """`train` for learning, `select` for every choice, `val` for the last comparison only."""

    classes: tuple[str, ...]
    train: Split
    select: Split
    val: Split


def open_folder(folder: Path, labels: Sequence[str], outputs: int, seed: int) -> Dataset:
    """Read the tree `train/CLASS/*` and `val/CLASS/*`.

    Args:
        folder: The data folder; `classes.txt` in it, one folder name a line, fixes the order of the classes.
        labels: The model's own class names; they fix the order where they are the folders' names.
        outputs: The model's number of outputs.
        seed: For the `select` part, cut from `train`.

    Raises:
        InputError: The folder is missing, empty, laid out otherwise, or does not fit the model.
    """
    train, train_classes = _walk(folder, "train")
    val, val_classes = _walk(folder, "val")
    if train_classes != val_classes:
        raise InputError(
            "train and val hold different classes",
            where=folder,
            found=f"only in train: {listed(sorted(train_classes - val_classes)) or 'none'};"
            f" only in val: {listed(sorted(val_classes - train_classes)) or 'none'}",
            fix="give every class a folder, with images, in both",
        )
    classes = _class_order(folder, train_classes, labels, outputs)
    return dataset_of(_files(folder / "train", train, classes), _files(folder / "val", val, classes), classes, seed)


def open_val(folder: Path, labels: Sequence[str], outputs: int) -> Split:
    """Only the `val` part, for comparing.

    Raises:
        InputError: As `open_folder`.
    """
    found, names = _walk(folder, "val")
    return _whole("val", _files(folder / "val", found, _class_order(folder, names, labels, outputs)))


def dataset_of(train: Images, val: Images, classes: tuple[str, ...], seed: int) -> Dataset:
    """Cut the seeded `select` part from a collection that has a held-out part of its own."""
    share = min(SELECT_SHARE, SELECT_MOST / len(train.labels))
    rest, select = _stratified(train.labels, np.arange(len(train.labels)), share, seed)
    return Dataset(classes, Split("train", train, rest), Split("select", train, select), _whole("val", val))


def split_arrays(images: Images, classes: tuple[str, ...], val_share: float, seed: int) -> Dataset:
    """Cut a collection without a held-out part of its own; each class gives the same share."""
    rest, val = _stratified(images.labels, np.arange(len(images.labels)), val_share, seed)
    train, select = _stratified(images.labels, rest, SELECT_SHARE, seed + 1)
    return Dataset(classes, Split("train", images, train), Split("select", images, select), Split("val", images, val))


def identify(split: Split) -> ImageSet:
    """Read every image of a split once: its digests, and whether all of them decode.

    Raises:
        InputError: Some images are corrupt; the first few are named and all are counted.
    """

    def look(index: int) -> tuple[str, bool]:
        data = split.images.read(index)
        return hashlib.blake2b(data, digest_size=8).hexdigest(), is_whole(data)

    with ThreadPoolExecutor(_WORKERS) as pool:
        looked = list(pool.map(look, split.indices.tolist(), chunksize=64))
    corrupt = [split.images.name(int(i)) for i, (_, whole) in zip(split.indices, looked, strict=True) if not whole]
    if corrupt:
        raise InputError(
            f"{len(corrupt)} of {len(split)} {split.role} images cannot be decoded",
            found=listed(corrupt),
            fix="replace or remove these files",
        )
    digests = sorted(digest for digest, _ in looked)
    whole_digest = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return ImageSet(split.role, len(digests), whole_digest, tuple(digests[:SKETCH_SIZE]))


def listing_sha256(images: ImageFiles) -> str:
    """Digest of names, sizes and times of change: what tells a folder that was looked at before from a changed one."""
    digest = hashlib.sha256()
    for name in images.names:
        stat = (images.folder / name).stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def require_disjoint(judged: ImageSet, shaped: Sequence[ImageSet]) -> None:
    """Refuse to judge a model on images that made it.

    Sets of up to `SKETCH_SIZE` images are compared whole. Of larger ones a uniform sample is: an overlap of a share p of
    n images stays unseen with a probability of about (1 - p) ** SKETCH_SIZE.

    Raises:
        InputError: Images are shared.
    """
    for other in shaped:
        shared = set(judged.sketch) & set(other.sketch)
        if shared:
            raise InputError(
                f"{judged.role} images also shaped the model",
                found=f"at least {len(shared)} of {judged.images} are among its {other.images} {other.role} images",
                fix="compare on images that were used neither for masks nor for statistics",
            )


def batches(
    split: Split, preprocessing: Preprocessing, size: int, order: npt.NDArray[np.int64] | None = None
) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
    """Preprocessed batches, decoded ahead of use by a few threads.

    Args:
        split: Images to read.
        preprocessing: Their preprocessing.
        size: Images a batch; the last one may be smaller.
        order: Positions within the split; as stored by default.

    Yields:
        Images (N, channels, H, W) float32 and labels (N,) int64.
    """
    positions = np.arange(len(split)) if order is None else order

    def load(chunk: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return np.stack([decode(split.images.read(int(i)), preprocessing) for i in split.indices[chunk]])

    chunks = [positions[start : start + size] for start in range(0, len(positions), size)]
    with ThreadPoolExecutor(_WORKERS) as pool:
        waiting = [pool.submit(load, chunk) for chunk in chunks[:_WORKERS]]
        for i, chunk in enumerate(chunks):
            if i + _WORKERS < len(chunks):
                waiting.append(pool.submit(load, chunks[i + _WORKERS]))
            yield normalize(waiting.pop(0).result(), preprocessing), split.labels[chunk]


def _walk(folder: Path, part: str) -> tuple[list[tuple[str, str]], set[str]]:
    """All (class, path below the part) and the class names."""
    root = folder / part
    if not folder.is_dir():
        raise InputError(
            "data folder not found", where=folder, fix="give --data a folder with train/CLASS/ and val/CLASS/"
        )
    if not root.is_dir():
        holds = listed(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise InputError(
            f"no {part}/ in the data folder",
            where=folder,
            found=holds,
            fix="lay it out as train/CLASS/*.jpg and val/CLASS/*.jpg",
        )
    found: list[tuple[str, str]] = []
    empty = []
    for folder_of_class in sorted(p for p in root.iterdir() if p.is_dir()):
        files = sorted(p for p in folder_of_class.rglob("*") if p.suffix.lower() in _EXTENSIONS and p.is_file())
        if not files:
            empty.append(folder_of_class.name)
        found += [(folder_of_class.name, p.relative_to(root).as_posix()) for p in files]
    if not found or empty:
        loose = sum(p.suffix.lower() in _EXTENSIONS for p in root.iterdir())
        holds = (
            f"class folders without images: {listed(empty)}" if empty else f"no class folders and {loose} loose images"
        )
        raise InputError(
            f"{part}/ holds no images in class folders" if not found else f"some classes of {part}/ are empty",
            where=root,
            found=holds,
            fix=f"one folder a class: {part}/CLASS/*.jpg",
        )
    return found, {name for name, _ in found}


def _lines(path: Path) -> list[str]:
    try:
        return read_bytes(path).decode().splitlines()
    except UnicodeDecodeError as error:
        raise InputError("not a text file", where=path, found=error, fix="save it as UTF-8") from error


def _class_order(folder: Path, names: set[str], labels: Sequence[str], outputs: int) -> tuple[str, ...]:
    listing = folder / "classes.txt"
    if listing.is_file():
        order = tuple(line.strip() for line in _lines(listing) if line.strip())
        if set(order) != names or len(order) != len(names):
            unlisted, absent = sorted(names - set(order)), sorted(set(order) - names)
            raise InputError(
                "classes.txt does not name the class folders",
                where=listing,
                found=f"not listed: {listed(unlisted) or 'none'}; without a folder: {listed(absent) or 'none'}",
                fix="one folder name a line, each once",
            )
    elif set(labels) == names:
        order = tuple(labels)
    else:
        order = tuple(sorted(names))
    if len(order) != outputs:
        raise InputError(
            "the data and the model differ in classes",
            where=folder,
            found=f"{len(order)} class folders, {outputs} model outputs",
            fix=f"give a model with {len(order)} outputs (--classes {len(order)}), or the data it was trained for",
        )
    return order


def _files(root: Path, found: list[tuple[str, str]], classes: tuple[str, ...]) -> ImageFiles:
    number = {name: i for i, name in enumerate(classes)}
    return ImageFiles(root, tuple(p for _, p in found), np.array([number[c] for c, _ in found], dtype=np.int64))


def _whole(role: str, images: Images) -> Split:
    return Split(role, images, np.arange(len(images.labels)))


def _stratified(
    labels: npt.NDArray[np.int64], indices: npt.NDArray[np.int64], share: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Cut `share` of every class off, at least one image where a class has two; both parts keep the order."""
    generator = np.random.default_rng(seed)
    cut: list[int] = []
    for label in np.unique(labels[indices]):
        members = indices[labels[indices] == label]
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        cut += generator.choice(members, count, replace=False).tolist()
    chosen = np.array(sorted(cut), dtype=np.int64)
    return np.setdiff1d(indices, chosen), chosen
