"""What models say of the same images, asked once: logits on the fixed ones, first choices on all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from maskplan.engines.base import Classifier
from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.data.dataset import Split, batches

UNLABELED = -1
"""The label of an image that has none."""

_SEED = 20240229
_BATCH = 32

Batches = Iterable[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]


@dataclass(frozen=True)
class ModelOutputs:
    """What one model says. Logits are kept for the fixed images only, so that any number of images fits into memory.

    Attributes:
        fixed: Logits on the fixed images, (F, classes) float32.
        first: Highest class of each image, (N,) int32; empty where there are no images but noise.
        in_top5: Whether fewer than five classes score above the label, (N,) bool; False without a label.
        finite: Whether every logit was, on all images.
    """

    fixed: npt.NDArray[np.float32]
    first: npt.NDArray[np.int32]
    in_top5: npt.NDArray[np.bool_]
    finite: bool


def run_models(
    models: Mapping[str, Classifier], preprocessing: Preprocessing, images: Split | None, fixed_count: int
) -> dict[str, ModelOutputs]:
    """Run every model once on every image; without images, on noise.

    Args:
        models: By name.
        preprocessing: Preprocessing of all of them.
        images: All to be answered; those with the label `UNLABELED` have no top-5.
        fixed_count: How many of them are fixed images.
    """
    if images is None or not len(images):
        noise = _noise(preprocessing, fixed_count)
        return run_on_batches(models, _cut(noise, np.full(len(noise), UNLABELED)), 0, np.arange(len(noise)))
    total = -(-len(images) // _BATCH)
    stream = track(batches(images, preprocessing, _BATCH), "compare", total)
    return run_on_batches(models, stream, len(images), fixed_image_positions(images, fixed_count))


def run_on_batches(
    models: Mapping[str, Classifier], stream: Batches, count: int, fixed: npt.NDArray[np.int64]
) -> dict[str, ModelOutputs]:
    """As `run_models`, from batches of images (N, channels, H, W) and labels (N,).

    Args:
        models: By name.
        stream: The batches.
        count: How many images are answered; those that come after are looked at for the fixed ones only.
        fixed: Positions of the fixed images in the stream, ascending.
    """
    kept: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in models}
    first = {name: np.empty(count, np.int32) for name in models}
    in_top5 = {name: np.zeros(count, np.bool_) for name in models}
    finite = dict.fromkeys(models, True)
    start = 0
    for x, labels in stream:
        rows = fixed[np.searchsorted(fixed, start) : np.searchsorted(fixed, start + len(x))] - start
        here = slice(start, min(start + len(x), count))
        size = here.stop - here.start
        for name, model in models.items():
            logits = model.logits(x)
            finite[name] = finite[name] and bool(np.isfinite(logits).all())
            kept[name].append(logits[rows])
            if size > 0:
                first[name][here] = logits[:size].argmax(axis=1)
                in_top5[name][here] = in_top_k(logits[:size], labels[:size], 5)
        start += len(x)
    return {name: ModelOutputs(np.concatenate(kept[name]), first[name], in_top5[name], finite[name]) for name in models}


def in_top_k(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.bool_]:
    """Whether fewer than `k` classes score above the label; NaN scores count as above, and no label is in no top."""
    own = np.take_along_axis(logits, np.maximum(labels, 0)[:, None], axis=1)
    return np.asarray(((~(logits <= own)).sum(axis=1) < k) & (labels != UNLABELED))


def fixed_image_positions(images: Split, count: int) -> npt.NDArray[np.int64]:
    """Where the fixed images lie in a split, ascending: drawn with a fixed seed, all where there are no more."""
    return np.flatnonzero(np.isin(images.indices, images.sample(count, _SEED).indices))


def load_fixed_images(preprocessing: Preprocessing, images: Split | None, count: int) -> npt.NDArray[np.float32]:
    """The same images every time, in the order in which `run_models` meets them; without any, normal noise."""
    if images is None or not len(images):
        return _noise(preprocessing, count)
    positions = fixed_image_positions(images, count)
    return np.concatenate([x for x, _ in batches(images, preprocessing, _BATCH, positions)])


def compute_logits(model: Classifier, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Images (N, channels, H, W) to logits (N, classes), a batch at a time."""
    return np.concatenate([model.logits(x) for x, _ in _cut(images, np.full(len(images), UNLABELED))])


def _noise(preprocessing: Preprocessing, count: int) -> npt.NDArray[np.float32]:
    shape = (count, preprocessing.channels, preprocessing.height, preprocessing.width)
    return np.random.default_rng(_SEED).standard_normal(shape, dtype=np.float32)


def _cut(
    images: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
    for start in range(0, len(images), _BATCH):
        yield images[start : start + _BATCH], labels[start : start + _BATCH]
