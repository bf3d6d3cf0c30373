"""Check that models and data number the classes alike: by class names and, without names, by the predictions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Provenance
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.statistics import mcnemar_p
from maskplan.pipeline.data.dataset import ImageFiles, Split

_MAX_P = 1e-4


def class_names(images: Split | None, provenances: Sequence[Provenance | None]) -> tuple[str, ...]:
    """Class names in the order of the outputs: the data's class folders, else a model's labels; empty if unknown."""
    return _folders(images) or next((p.labels for p in provenances if p is not None and p.labels), ())


def require_same_class_order(images: Split | None, provenances: Sequence[Provenance | None]) -> None:
    """Refuse models, or a model and data, that give one class different numbers.

    Names that only one of them has are ignored: class folders are often named differently from the model's labels.

    Raises:
        InputError: A class has different numbers.
    """
    known = [p.labels for p in provenances if p is not None and p.labels]
    orders = [("the dense model", known[0]), ("the sparse model", known[-1])] if len(known) > 1 else []
    orders = orders or [("the model", labels) for labels in known]
    folders = _folders(images)
    if folders:
        orders.append(("the data's folders", folders))
    for i, (name, order) in enumerate(orders):
        for other_name, other in orders[i + 1 :]:
            number = {label: k for k, label in enumerate(order)}
            moved = [label for k, label in enumerate(other) if number.get(label, k) != k]
            if moved:
                raise InputError(
                    "the classes are not in the same order",
                    found=f"{name}: {listed(order, 10)}; {other_name}: {listed(other, 10)};"
                    f" {len(moved)} differ, for example {moved[0]!r}",
                    fix="write classes.txt into the data folder: the class folders in the order of the model's outputs",
                )


def looks_reordered(top1: npt.NDArray[np.int32], labels: npt.NDArray[np.int64]) -> tuple[float, float] | None:
    """Whether a model would be far more accurate if its outputs were assigned to other classes.

    Each output is assigned the most frequent label of the images that it is predicted for, on one half of the images, and
    is evaluated on the other half, so that chance gains nothing. The accuracy must also exceed that of always predicting
    the most frequent label.

    Args:
        top1: Top-1 predictions, (N,).
        labels: (N,), none of them `UNLABELED`.

    Returns:
        Accuracy in percent as it is and with the outputs reassigned, if that doubles it significantly; else None.
    """
    right = top1 == labels
    renamed = np.zeros(len(labels), np.bool_)
    even, odd = slice(0, None, 2), slice(1, None, 2)
    for fitted, evaluated in ((even, odd), (odd, even)):
        names = _most_frequent(top1[fitted], labels[fitted], int(top1.max(initial=0)) + 1)
        renamed[evaluated] = names[top1[evaluated]] == labels[evaluated]
    commonest = labels == np.bincount(labels, minlength=1).argmax()
    doubled = renamed.sum() >= 2 * right.sum()
    if not (doubled and _significantly_more(renamed, right) and _significantly_more(renamed, commonest)):
        return None
    return 100 * float(right.mean()), 100 * float(renamed.mean())


def _significantly_more(more: npt.NDArray[np.bool_], fewer: npt.NDArray[np.bool_]) -> bool:
    gained, lost = int((more & ~fewer).sum()), int((fewer & ~more).sum())
    return gained > lost and mcnemar_p(lost, gained) < _MAX_P


def _most_frequent(top1: npt.NDArray[np.int32], labels: npt.NDArray[np.int64], outputs: int) -> npt.NDArray[np.int64]:
    """The most frequent label of the images of each predicted class; -1 for a class that is never predicted."""
    base = int(labels.max(initial=0)) + 1
    pairs, counts = np.unique(top1.astype(np.int64) * base + labels, return_counts=True)
    ascending = pairs[np.argsort(counts, kind="stable")]
    names = np.full(outputs, -1, np.int64)
    names[ascending // base] = ascending % base
    return names


def _folders(images: Split | None) -> tuple[str, ...]:
    """Class folders in the order of their numbers; empty for images without class folders."""
    if images is None or not isinstance(images.images, ImageFiles) or (images.labels < 0).any():
        return ()
    files = images.images
    by_number = dict(zip(files.labels.tolist(), (name.partition("/")[0] for name in files.names), strict=True))
    return tuple(by_number[number] for number in sorted(by_number))
