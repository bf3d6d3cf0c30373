"""Do the models and the data number the classes alike? By their names and, where these say nothing, by the answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Provenance
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.statistics import mcnemar_p
from maskplan.pipeline.data.dataset import ImageFiles, Split

_SURE = 1e-4


def class_names(images: Split | None, provenances: Sequence[Provenance | None]) -> tuple[str, ...]:
    """Names in the order of the outputs: the data's class folders, else a model's labels; none where neither tells."""
    return _folders(images) or next((p.labels for p in provenances if p is not None and p.labels), ())


def require_one_order(images: Split | None, provenances: Sequence[Provenance | None]) -> None:
    """Refuse models, or a model and data, that give one class two numbers.

    Names that only one of them knows prove nothing: folders are often called otherwise than the model's labels.

    Raises:
        InputError: They do.
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
                    f" {len(moved)} differ, such as {moved[0]!r}",
                    fix="bring them into one order: classes.txt in the data folder names the folders in the order of the"
                    " model's outputs",
                )


def looks_reordered(first: npt.NDArray[np.int32], labels: npt.NDArray[np.int64]) -> tuple[float, float] | None:
    """Whether a model would be right far more often if its outputs had other names.

    Each output is named after the label that most of its images bear, on one half of the images, and judged on the other,
    so that chance gains nothing. It must also be right beyond what the commonest label alone would be.

    Args:
        first: First choices, (N,).
        labels: (N,), none of them `UNLABELED`.

    Returns:
        Percent right as it is and with the names changed, where that doubles it beyond doubt; else None.
    """
    right = first == labels
    renamed = np.zeros(len(labels), np.bool_)
    even, odd = slice(0, None, 2), slice(1, None, 2)
    for learned, judged in ((even, odd), (odd, even)):
        names = _most_frequent(first[learned], labels[learned], int(first.max(initial=0)) + 1)
        renamed[judged] = names[first[judged]] == labels[judged]
    commonest = labels == np.bincount(labels, minlength=1).argmax()
    doubled = renamed.sum() >= 2 * right.sum()
    if not (doubled and _surely_more(renamed, right) and _surely_more(renamed, commonest)):
        return None
    return 100 * float(right.mean()), 100 * float(renamed.mean())


def _surely_more(many: npt.NDArray[np.bool_], few: npt.NDArray[np.bool_]) -> bool:
    gained, lost = int((many & ~few).sum()), int((few & ~many).sum())
    return gained > lost and mcnemar_p(lost, gained) < _SURE


def _most_frequent(first: npt.NDArray[np.int32], labels: npt.NDArray[np.int64], outputs: int) -> npt.NDArray[np.int64]:
    """The label that most images of each first choice bear; -1 for a choice that none made."""
    base = int(labels.max(initial=0)) + 1
    pairs, counts = np.unique(first.astype(np.int64) * base + labels, return_counts=True)
    ascending = pairs[np.argsort(counts, kind="stable")]
    names = np.full(outputs, -1, np.int64)
    names[ascending // base] = ascending % base
    return names


def _folders(images: Split | None) -> tuple[str, ...]:
    """Class folders in the order of their numbers; none for images that lie in no such folders."""
    if images is None or not isinstance(images.images, ImageFiles) or (images.labels < 0).any():
        return ()
    files = images.images
    by_number = dict(zip(files.labels.tolist(), (name.partition("/")[0] for name in files.names), strict=True))
    return tuple(by_number[number] for number in sorted(by_number))
