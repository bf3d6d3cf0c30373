"""Whether `select` is held out for the dense network: choices on images that it was trained on are too optimistic."""

from __future__ import annotations

import math

import numpy as np

from maskplan.engines.base import Classifier
from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.data.dataset import Dataset, Split, batches

_IMAGES, _BATCH, _SEED = 256, 32, 0
# Standard errors by which `select` must exceed `val` before it is reported.
_STANDARD_ERRORS = 3.0


def held_out_note(dense: Classifier, preprocessing: Preprocessing, data: Dataset, top1_val: float) -> str | None:
    """A note if the dense network is far better on `select` than on `val`, and about as good as on `train`.

    Args:
        dense: The untouched network.
        preprocessing: Its preprocessing.
        data: A seeded sample of 256 images of `train` and of `select` is used.
        top1_val: Its top-1 accuracy on `val`, in percent.
    """
    if not len(data.select) or not len(data.train) or not len(data.val):
        return None
    select, train = (_top1(dense, preprocessing, part.sample(_IMAGES, _SEED)) for part in (data.select, data.train))
    error = math.hypot(
        _standard_error(select, min(_IMAGES, len(data.select))), _standard_error(top1_val, len(data.val))
    )
    between = math.hypot(*(_standard_error(p, _IMAGES) for p in (select, train)))
    if select - top1_val <= _STANDARD_ERRORS * error or train - select > _STANDARD_ERRORS * between:
        return None
    return (
        f"select is not held out: the dense network has {select:.1f}% top-1 on it, {train:.1f}% on train and"
        f" {top1_val:.1f}% on val, so it has probably been trained on these images; choices made on select are optimistic"
    )


def _top1(model: Classifier, preprocessing: Preprocessing, images: Split) -> float:
    right = [np.argmax(model.logits(x), axis=1) == labels for x, labels in batches(images, preprocessing, _BATCH)]
    return 100 * float(np.concatenate(right).mean())


def _standard_error(percent: float, images: int) -> float:
    # Laplace's rule keeps the error of 0% and 100% above zero.
    share = (percent / 100 * images + 1) / (images + 2)
    return 100 * math.sqrt(share * (1 - share) / images)
