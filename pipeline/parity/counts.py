"""Counts of one model beside the dense one, image by image: hits, agreement, flips in each direction, classes."""

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
    """What two models' answers to the same images come to.

    Attributes:
        images: All of them.
        labeled: Those with a label; the others count for `flips` alone.
        top1: Of the labeled ones, by who got them right: the dense model, this one, both, neither.
        top5: The same for the five highest classes.
        flips: Changed first choices.
        classes: Hits by class, of the classes that occur, in the order of the outputs.
    """

    images: int
    labeled: int
    top1: PairedCounts
    top5: PairedCounts
    flips: Flips
    classes: tuple[ClassDrop, ...]


def count_outcomes(
    dense: ModelOutputs, own: ModelOutputs, labels: npt.NDArray[np.int64], names: Sequence[str] = ()
) -> OutcomeCounts:
    """Count two models' answers.

    Args:
        dense: Of the reference.
        own: Of the model beside it.
        labels: (N,), `UNLABELED` where there is none.
        names: Of the classes, in the order of the outputs; their numbers where there are no more.
    """
    known = labels != UNLABELED
    hits, dense_hits = (a.first == labels for a in (own, dense))
    changed = own.first != dense.first
    lost, gained = dense_hits & ~hits & known, hits & ~dense_hits & known
    return OutcomeCounts(
        images=len(labels),
        labeled=int(known.sum()),
        top1=_paired(dense_hits[known], hits[known]),
        top5=_paired(dense.in_top5[known], own.in_top5[known]),
        flips=Flips(
            changed=int(changed.sum()),
            right_to_wrong=int(lost.sum()),
            wrong_to_right=int(gained.sum()),
            wrong_to_wrong=int((changed & known & ~lost & ~gained).sum()),
        ),
        classes=_classes(labels[known], dense_hits[known], hits[known], names),
    )


def _paired(dense: npt.NDArray[np.bool_], own: npt.NDArray[np.bool_]) -> PairedCounts:
    return PairedCounts(
        both=int((dense & own).sum()),
        only_first=int((dense & ~own).sum()),
        only_second=int((own & ~dense).sum()),
        neither=int((~dense & ~own).sum()),
    )


def _classes(
    labels: npt.NDArray[np.int64], dense: npt.NDArray[np.bool_], own: npt.NDArray[np.bool_], names: Sequence[str]
) -> tuple[ClassDrop, ...]:
    if not len(labels):
        return ()
    images, dense_right, right = (np.bincount(labels[w], minlength=labels.max() + 1) for w in (labels >= 0, dense, own))
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
