"""Run each model once over the images: logits on the fixed images, top-1 predictions on all of them."""

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
    """The outputs of one model. Only the logits of the fixed images are kept, so memory does not grow with the data set.

    Attributes:
        fixed_logits: Logits on the F fixed images, (F, classes) float32.
        top1: Highest-scoring class of each image, (N,) int32; empty if the model ran on noise.
        in_top5: Whether fewer than five classes score above the label, (N,) bool; False without a label.
        finite: Whether all logits of all images are finite.
    """

    fixed_logits: npt.NDArray[np.float32]
    top1: npt.NDArray[np.int32]
    in_top5: npt.NDArray[np.bool_]
    finite: bool


def run_models(
    models: Mapping[str, Classifier], preprocessing: Preprocessing, images: Split | None, fixed_count: int
) -> dict[str, ModelOutputs]:
    """Run every model once on every image; without images, on noise.

    Args:
        models: Models by name.
        preprocessing: Preprocessing that all models share.
        images: The images; those with the label `UNLABELED` count for no top-5.
        fixed_count: Number of fixed images.
    """
    if images is None or not len(images):
        noise = _noise(preprocessing, fixed_count)
        return run_on_batches(models, _split_batches(noise), 0, np.arange(len(noise)))
    total = -(-len(images) // _BATCH)
    stream = track(batches(images, preprocessing, _BATCH), "compare", total)
    return run_on_batches(models, stream, len(images), fixed_image_positions(images, fixed_count))


def run_on_batches(
    models: Mapping[str, Classifier], stream: Batches, count: int, fixed: npt.NDArray[np.int64]
) -> dict[str, ModelOutputs]:
    """As `run_models`, from batches of images (N, channels, H, W) and labels (N,).

    Args:
        models: Models by name.
        stream: The batches.
        count: Number of images whose predictions are kept; of later images only the fixed ones' logits are.
        fixed: Positions of the fixed images in the stream, ascending.
    """
    fixed_logits: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in models}
    top1 = {name: np.empty(count, np.int32) for name in models}
    in_top5 = {name: np.zeros(count, np.bool_) for name in models}
    finite = dict.fromkeys(models, True)
    start = 0
    for x, labels in stream:
        rows = fixed[np.searchsorted(fixed, start) : np.searchsorted(fixed, start + len(x))] - start
        batch = slice(start, min(start + len(x), count))
        size = batch.stop - batch.start
        for name, model in models.items():
            logits = model.logits(x)
            finite[name] = finite[name] and bool(np.isfinite(logits).all())
            fixed_logits[name].append(logits[rows])
            if size > 0:
                top1[name][batch] = logits[:size].argmax(axis=1)
                in_top5[name][batch] = in_top_k(logits[:size], labels[:size], 5)
        start += len(x)
    return {n: ModelOutputs(np.concatenate(fixed_logits[n]), top1[n], in_top5[n], finite[n]) for n in models}


def in_top_k(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.bool_]:
    """Whether fewer than `k` classes score above the label.

    NaN scores count as above; images without a label are in no top k.

    Args:
        logits: (N, classes).
        labels: (N,).
        k: Number of classes.
    """
    own = np.take_along_axis(logits, np.maximum(labels, 0)[:, None], axis=1)
    return np.asarray(((~(logits <= own)).sum(axis=1) < k) & (labels != UNLABELED))


def fixed_image_positions(images: Split, count: int) -> npt.NDArray[np.int64]:
    """Positions of the fixed images in a split, ascending: drawn with a fixed seed, or all if there are no more."""
    return np.flatnonzero(np.isin(images.indices, images.sample(count, _SEED).indices))


def load_fixed_images(preprocessing: Preprocessing, images: Split | None, count: int) -> npt.NDArray[np.float32]:
    """The fixed images (count, channels, H, W), always the same ones; without a split, normally distributed noise.

    They are in the order in which `run_models` runs them.
    """
    if images is None or not len(images):
        return _noise(preprocessing, count)
    positions = fixed_image_positions(images, count)
    return np.concatenate([x for x, _ in batches(images, preprocessing, _BATCH, positions)])


def compute_logits(model: Classifier, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Images (N, channels, H, W) to logits (N, classes), a batch at a time."""
    return np.concatenate([model.logits(x) for x, _ in _split_batches(images)])


def _noise(preprocessing: Preprocessing, count: int) -> npt.NDArray[np.float32]:
    shape = (count, preprocessing.channels, preprocessing.height, preprocessing.width)
    return np.random.default_rng(_SEED).standard_normal(shape, dtype=np.float32)


def _split_batches(images: npt.NDArray[np.float32]) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
    """Batches of images without labels."""
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        yield batch, np.full(len(batch), UNLABELED)
