"""Inputs of a network of any kind: a folder of images for one image input, or arrays by input name in .npz or .npy files."""

from __future__ import annotations

import hashlib
import logging
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import ImageSet, Preprocessing, TensorSpec
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.image_shape import image_shape
from maskplan.pipeline.data.dataset import ImageFiles, Split, batches, image_paths
from maskplan.pipeline.data.image_sets import identify
from maskplan.pipeline.data.membership import encode_members, members_of

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

_CHANNELS = (1, 3)
_FLOATS = ("float32", "float16", "float64")
_SEED = 0
# What NumPy raises on damaged files.
_UNREADABLE = (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error, SyntaxError)


class Samples(Protocol):
    """Rows of inputs, in a fixed order."""

    def __len__(self) -> int: ...

    @property
    def targets(self) -> Mapping[str, Array]:
        """Arrays that belong to the samples and are no inputs, such as labels, one row for each sample."""
        ...

    def batches(self, size: int) -> Iterator[Feeds]:
        """Feeds of at most `size` samples each, by input name."""
        ...

    def sample(self, count: int, seed: int) -> Samples:
        """At most `count` samples, drawn with `seed`, in their order."""
        ...

    def identify(self) -> ImageSet:
        """Digests of the samples."""
        ...


@dataclass(frozen=True)
class ImageSamples:
    """Images for the only input of a network.

    Attributes:
        split: The image files.
        preprocessing: From image files to values.
        input: The input, of (N, channels, H, W) or (N, H, W, channels).
        channels_last: Which of the two.
    """

    split: Split
    preprocessing: Preprocessing
    input: TensorSpec
    channels_last: bool = False

    def __len__(self) -> int:
        return len(self.split)

    @property
    def targets(self) -> Mapping[str, Array]:
        labels = self.split.labels
        return {"labels": labels} if (labels >= 0).any() else {}

    def batches(self, size: int) -> Iterator[Feeds]:
        for images, _ in batches(self.split, self.preprocessing, size):
            yield {self.input.name: self._as_input(images)}

    def _as_input(self, images: npt.NDArray[np.float32]) -> Array:
        values = images.transpose(0, 2, 3, 1) if self.channels_last else images
        dtype = np.dtype(self.input.dtype)
        if dtype.kind in "iu":
            values = np.clip(np.rint(values), np.iinfo(dtype).min, np.iinfo(dtype).max)
        return np.ascontiguousarray(values, dtype)

    def sample(self, count: int, seed: int) -> ImageSamples:
        return replace(self, split=self.split.sample(count, seed))

    def identify(self) -> ImageSet:
        return identify(self.split)


@dataclass(frozen=True)
class TensorSamples:
    """Arrays by input name, one row for each sample.

    Attributes:
        role: `train` or `val`.
        arrays: All with the same number of rows.
        targets: Arrays that are no inputs.
        one_run_each: A row is what one run takes, with its batch axis if there is one; rows are not joined to batches.
    """

    role: str
    arrays: Mapping[str, Array]
    targets: Mapping[str, Array]
    one_run_each: bool = False

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def batches(self, size: int) -> Iterator[Feeds]:
        for start in range(0, len(self), 1 if self.one_run_each else size):
            rows = start if self.one_run_each else slice(start, start + size)
            # Not `ascontiguousarray`, which makes scalars vectors.
            yield {name: np.asarray(array[rows], order="C") for name, array in self.arrays.items()}

    def sample(self, count: int, seed: int) -> TensorSamples:
        if count >= len(self):
            return self
        rows = np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False))
        arrays, targets = ({n: a[rows] for n, a in part.items()} for part in (self.arrays, self.targets))
        return replace(self, arrays=arrays, targets=targets)

    def identify(self) -> ImageSet:
        digests = [_digest(self.arrays, row) for row in range(len(self))]
        ordered = "\n".join(f"{digest} {_digest(self.targets, row)}" for row, digest in enumerate(digests))
        return ImageSet(
            role=self.role,
            images=len(digests),
            sha256=hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest(),
            members=encode_members(members_of(sorted(digests))),
            labeled_sha256=hashlib.sha256(ordered.encode()).hexdigest(),
        )


@dataclass(frozen=True)
class ImageOptions:
    """How image files become an input, where no record tells.

    Attributes:
        shape: Size of one image in the input's own order of axes, where the input's is dynamic; None if it is not.
        mean: Subtracted from values in [0, 1], one number for each channel; None for 0.
        std: Divides the result; None for 1.
        preprocessing: The record's, which the other three do not change.
    """

    shape: tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    preprocessing: Preprocessing | None = None


def open_samples(data: Path, role: str, inputs: Sequence[TensorSpec], options: ImageOptions, where: object) -> Samples:
    """Open the data of a network.

    `data` is a `.npz` file with an array for each input, or a folder with one `.npy` file for each input, or such a file for
    the only input, or a folder of images, with or without class folders. In a folder, `train.npz` and `val.npz`, or `train/`
    and `val/`, are taken by `role` if they are there. Arrays of other names are targets.

    Args:
        data: The file or folder.
        role: `train` or `val`.
        inputs: The network's inputs.
        options: For image files.
        where: Name of the network in messages.

    Raises:
        InputError: There is no data or no input, or they do not fit.
    """
    _require_inputs(inputs, where)
    if not data.exists():
        kind = "file" if data.suffix else "folder"
        raise InputError(f"data {kind} not found", where=data, fix="give --data a folder of images or a .npz file")
    for place in (data / f"{role}.npz", data / role):
        if data.is_dir() and place.exists():
            data = place
            break
    if data.suffix == ".npy" and data.is_file() and len(inputs) == 1:
        return _tensors({inputs[0].name: _load(data)}, role, inputs, data)
    if data.is_file():
        return _tensors(_read_npz(data), role, inputs, data)
    arrays = {path.stem: path for path in sorted(data.glob("*.npy"))}
    if arrays:
        return _tensors({name: _load(path) for name, path in arrays.items()}, role, inputs, data)
    return _images(data, role, inputs, options, where)


def noise_samples(
    inputs: Sequence[TensorSpec], count: int, shape: tuple[int, ...] | None, where: object, seed: int = _SEED
) -> Samples:
    """Seeded noise: normally distributed floats; of other types, small numbers from 0 to 1.

    Raises:
        InputError: There is no input, or the size of one is not known.
    """
    _require_inputs(inputs, where)
    generator = np.random.default_rng(seed)
    batched = all(spec.shape[:1] == (None,) for spec in inputs)
    arrays = {}
    for spec in inputs:
        rest = image_shape(spec, shape if len(inputs) == 1 else None, str(where)) if spec.shape else ()
        whole = () if not spec.shape else ((spec.shape[0] or 1), *rest)
        size = (count, *rest) if batched else (count, *whole)
        if spec.dtype in _FLOATS:
            arrays[spec.name] = generator.standard_normal(size, np.float32).astype(spec.dtype, copy=False)
        else:
            arrays[spec.name] = generator.integers(0, 2, size).astype(spec.dtype)
    return TensorSamples("val", arrays, {}, one_run_each=not batched)


def image_options_shape(spec: TensorSpec, channels_last: bool, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(channels, H, W) of a size in the input's own order of axes."""
    channels, height, width = (shape[2], shape[0], shape[1]) if channels_last else shape
    return channels, height, width


def is_channels_last(spec: TensorSpec) -> bool:
    """Whether an image input is (N, H, W, channels), by its sizes."""
    few = (*_CHANNELS, 4)
    return len(spec.shape) == 4 and spec.shape[3] in few and spec.shape[1] not in few


def _require_inputs(inputs: Sequence[TensorSpec], where: object) -> None:
    if not inputs:
        raise InputError("the network has no inputs, so it cannot be run on data", where=where)


def _images(data: Path, role: str, inputs: Sequence[TensorSpec], options: ImageOptions, where: object) -> ImageSamples:
    ask = "give a .npz file with an array for each input"
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        found = ", ".join(f"{s.name} {s.dtype} {_shown(s.shape)}" for s in inputs)
        raise InputError(
            "a folder of images fits networks with one image input only", where=where, found=found, fix=ask
        )
    spec = inputs[0]
    names = tuple(sorted(path.relative_to(data).as_posix() for path in image_paths(data)))
    if not names:
        raise InputError("no images and no .npy files in the data folder", where=data, fix=f"give images, or {ask[5:]}")
    channels_last = is_channels_last(spec)
    preprocessing = options.preprocessing or _preprocessing(spec, channels_last, options, where)
    files = ImageFiles(data, names, _labels(names))
    return ImageSamples(Split(role, files, np.arange(len(names))), preprocessing, spec, channels_last)


def _preprocessing(spec: TensorSpec, channels_last: bool, options: ImageOptions, where: object) -> Preprocessing:
    shape = image_shape(spec, options.shape, str(where))
    channels, height, width = image_options_shape(spec, channels_last, shape)
    if channels not in _CHANNELS:
        raise InputError(
            f"the input has {channels} channels, and images have 1 or 3",
            where=where,
            found=f"{spec.name} {_shown(spec.shape)}",
            fix="give a .npz file with an array for the input",
        )
    # Integers take the pixels as they are, which is a standard deviation of 1/255.
    unit = 1.0 if spec.dtype in _FLOATS else 1 / 255
    mean, std = options.mean or (0.0,) * channels, options.std or (unit,) * channels
    if not len(mean) == len(std) == channels or min(std) <= 0:
        found = f"mean {mean}, standard deviation {std}, {channels} channels"
        fix = "give one number per channel, standard deviations above zero"
        raise InputError("mean and standard deviation do not fit the channels", where=where, found=found, fix=fix)
    return Preprocessing(channels, height, width, 0, "bilinear", mean, std)


def _labels(names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Numbers of the folders that images are in, in the order of their names; -1 for all if some are in none."""
    folders = [name.rpartition("/")[0] for name in names]
    if not all(folders):
        return np.full(len(names), -1, np.int64)
    numbers = {folder: number for number, folder in enumerate(sorted(set(folders)))}
    return np.array([numbers[folder] for folder in folders], np.int64)


def _read_npz(path: Path) -> dict[str, Array]:
    try:
        # NumPy leaves a damaged file open that it has opened itself.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (*_UNREADABLE, KeyError, AttributeError, TypeError) as error:
        fix = "write it with numpy.savez, with an array for each input"
        raise InputError("not a .npz file of arrays", where=path, found=error, fix=fix) from error


def _load(path: Path) -> Array:
    try:
        loaded: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except _UNREADABLE as error:
        raise InputError("not a .npy file", where=path, found=error, fix="write it with numpy.save") from error
    return loaded


def _tensors(found: Mapping[str, Array], role: str, inputs: Sequence[TensorSpec], where: Path) -> TensorSamples:
    """Check arrays against the inputs: names, types, ranks, sizes, rows; all problems in one message."""
    problems = [f"no array for the input {spec.name!r}" for spec in inputs if spec.name not in found]
    given = {spec.name: (spec, found[spec.name]) for spec in inputs if spec.name in found}
    # An array with one axis more than its input has whole inputs as rows.
    one_run_each = any(array.ndim == len(spec.shape) + 1 for spec, array in given.values())
    arrays = {}
    for name, (spec, array) in given.items():
        wanted = spec.shape if one_run_each else spec.shape[1:]
        if array.ndim != len(wanted) + 1 or any(
            d not in (None, size) for d, size in zip(wanted, array.shape[1:], strict=True)
        ):
            problems.append(f"{name} is {array.shape}; the input is {_shown(spec.shape)}")
        elif array.dtype.kind not in ("f" if spec.dtype in _FLOATS else "iub"):
            problems.append(f"{name} holds {array.dtype}; the input takes {spec.dtype}")
        elif not _in_range(array, spec.dtype):
            problems.append(f"{name} exceeds the range of {spec.dtype}")
        else:
            arrays[name] = array.astype(spec.dtype, copy=False)
    rows = {name: len(array) for name, array in found.items() if array.ndim}
    if not problems and len(set(rows.values())) != 1:
        problems.append(f"different numbers of samples: {', '.join(f'{n} {count}' for n, count in rows.items())}")
    if not problems and not next(iter(rows.values())):
        problems.append("no samples")
    if problems:
        fix = "give an array (samples, ...) for each input; targets may have other names"
        raise InputError("the data does not fit the network's inputs", where=where, found=listed(problems), fix=fix)
    targets = {name: array for name, array in found.items() if name not in arrays and array.ndim}
    return TensorSamples(role, arrays, targets, one_run_each)


def _in_range(array: Array, dtype: str) -> bool:
    """Whether integers keep their values in another type of integers."""
    if dtype in _FLOATS or dtype == "bool" or not array.size or array.dtype.kind == "b":
        return True
    bounds = np.iinfo(dtype)
    return bool(array.min() >= bounds.min and array.max() <= bounds.max)


def _digest(arrays: Mapping[str, Array], row: int) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(arrays):
        values = arrays[name][row]
        digest.update(f"{name} {np.shape(values)}".encode() + values.tobytes())
    return digest.hexdigest()


def _shown(shape: Sequence[int | None]) -> str:
    return f"({', '.join('dynamic' if d is None else str(d) for d in shape)})"
