"""Count a model's predictions against the dense model's, image by image: hits, agreement, flips by direction, classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.reports import ClassDrop, Flips
from maskplan.pipeline.core.statistics import PairedCounts
from maskplan.pipeline.parity.model_outputs import UNLABELED, ModelOutputs


@dataclass(frozen=True)
class OutcomeCounts:
    """Paired counts of two models' predictions on the same images.

    Attributes:
        images: Number of images.
        labeled: Number of images with a label; the others count for `flips` only.
        top1: Labeled images by which model is right: both, only the dense one, only this one, neither.
        top5: The same for the label among the five highest classes.
        flips: Changed top-1 predictions.
        classes: Accuracy by class, for the classes that occur, in the order of the outputs.
    """

    images: int
    labeled: int
    top1: PairedCounts
    top5: PairedCounts
    flips: Flips
    classes: tuple[ClassDrop, ...]


def count_outcomes(
    dense: ModelOutputs, other: ModelOutputs, labels: npt.NDArray[np.int64], names: Sequence[str] = ()
) -> OutcomeCounts:
    """Count two models' predictions.

    Args:
        dense: Outputs of the reference.
        other: Outputs of the model that is compared with it.
        labels: (N,), `UNLABELED` where there is none.
        names: Class names in the order of the outputs; a class without a name is called by its number.
    """
    known = labels != UNLABELED
    hits, dense_hits = (outputs.top1 == labels for outputs in (other, dense))
    changed = other.top1 != dense.top1
    lost, gained = dense_hits & ~hits & known, hits & ~dense_hits & known
    return OutcomeCounts(
        images=len(labels),
        labeled=int(known.sum()),
        top1=_paired(dense_hits[known], hits[known]),
        top5=_paired(dense.in_top5[known], other.in_top5[known]),
        flips=Flips(
            changed=int(changed.sum()),
            right_to_wrong=int(lost.sum()),
            wrong_to_right=int(gained.sum()),
            wrong_to_wrong=int((changed & known & ~lost & ~gained).sum()),
        ),
        classes=_class_drops(labels[known], dense_hits[known], hits[known], names),
    )


def _paired(dense: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> PairedCounts:
    return PairedCounts(
        both=int((dense & other).sum()),
        only_first=int((dense & ~other).sum()),
        only_second=int((other & ~dense).sum()),
        neither=int((~dense & ~other).sum()),
    )


def _class_drops(
    labels: npt.NDArray[np.int64], dense: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_], names: Sequence[str]
) -> tuple[ClassDrop, ...]:
    if not len(labels):
        return ()
    masks = (labels >= 0, dense, other)
    images, dense_right, right = (np.bincount(labels[mask], minlength=labels.max() + 1) for mask in masks)
    return tuple(
        ClassDrop(
            name=names[c] if c < len(names) else str(c),
            images=int(images[c]),
            top1_dense=100 * int(dense_right[c]) / int(images[c]),
            top1_sparse=100 * int(right[c]) / int(images[c]),
            drop=100 * (int(dense_right[c]) - int(right[c])) / int(images[c]),
        )
        for c in np.flatnonzero(images).tolist()
    )
