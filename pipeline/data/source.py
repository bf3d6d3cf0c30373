"""Where images come from: a folder of the user's, or the bundled digits for the bundled model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from maskplan.pipeline.data.dataset import Dataset, Split, has_class_folders, open_folder, open_images, open_val
from maskplan.pipeline.data.digits import BUNDLED_MODEL, CLASSES, load_digits


def find_dataset(
    folder: Path | None,
    *,
    model: str | None,
    labels: Sequence[str],
    outputs: int,
    seed: int,
    needs_classes: bool = True,
) -> Dataset | None:
    """Open the data folder if one is given, else the digits if the model was trained on them.

    Args:
        folder: Value of `--data`.
        model: The model's name; None for an ONNX file without a record of it.
        labels: The model's own class names; empty if unknown.
        outputs: Number of classes of the model; 0 for a network without classes, for which any folder of images serves.
        seed: For the `select` part of a folder. The split of the digits is fixed.
        needs_classes: Refuse a folder without class folders for a classifier; otherwise its images have no labels.

    Returns:
        None where there are no images for this model.

    Raises:
        InputError: The folder cannot be used; see `open_folder` and `open_images`.
        HostError: scikit-learn, which contains the digits, is not installed.
    """
    if folder is not None:
        if not outputs or (not needs_classes and folder.is_dir() and not has_class_folders(folder)):
            return open_images(folder, seed)
        return open_folder(folder, labels, outputs, seed)
    return load_digits() if _is_bundled(model, outputs) else None


def find_val(folder: Path | None, *, model: str | None, labels: Sequence[str], outputs: int) -> Split | None:
    """Only the `val` part of `find_dataset`; a folder needs no `train/` for it."""
    if folder is not None:
        return open_val(folder, labels, outputs) if outputs else open_images(folder, seed=0).val
    return load_digits().val if _is_bundled(model, outputs) else None


def _is_bundled(model: str | None, outputs: int) -> bool:
    # With --classes N the bundled model has another task.
    return model == BUNDLED_MODEL and outputs == len(CLASSES)
