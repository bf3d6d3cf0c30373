"""A folder of the user's comes first, then the digits for the bundled model, else there are no images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.digits import BUNDLED_MODEL, CLASSES, load_digits
from maskplan.pipeline.data.source import find_dataset, find_val


def test_a_folder_is_opened_with_the_models_labels_and_seed(toy_data: Path) -> None:
    labels = ("red", "blue", "green")
    first, second = (find_dataset(toy_data, model="resnet18", labels=labels, outputs=3, seed=seed) for seed in (1, 2))
    assert first is not None
    assert second is not None
    assert first.classes == labels
    assert first.select.indices.tolist() != second.select.indices.tolist()
    val = find_val(toy_data, model="resnet18", labels=labels, outputs=3)
    assert val is not None
    assert val.labels.tolist() == first.val.labels.tolist()


def test_a_folder_takes_precedence_over_the_digits(toy_data: Path) -> None:
    """It has three classes, so that the bundled model does not fit; the digits would."""
    for find in (find_val, lambda *a, **k: find_dataset(*a, **k, seed=0)):
        with pytest.raises(InputError, match="different numbers of classes"):
            find(toy_data, model=BUNDLED_MODEL, labels=CLASSES, outputs=10)


def test_val_needs_no_training_images(toy_data: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_data / "val", tmp_path / "val")
    val = find_val(tmp_path, model=None, labels=(), outputs=3)
    assert val is not None
    assert len(val) == 24
    with pytest.raises(InputError, match="no train/"):
        find_dataset(tmp_path, model=None, labels=(), outputs=3, seed=0)


def test_the_bundled_model_has_the_digits() -> None:
    assert find_dataset(None, model=BUNDLED_MODEL, labels=(), outputs=10, seed=5) is load_digits()
    assert find_val(None, model=BUNDLED_MODEL, labels=(), outputs=10) is load_digits().val


@pytest.mark.parametrize(("model", "outputs"), [("resnet18", 10), (None, 10), (BUNDLED_MODEL, 4)])
def test_any_other_model_or_task_has_no_images(model: str | None, outputs: int) -> None:
    assert find_dataset(None, model=model, labels=(), outputs=outputs, seed=0) is None
    assert find_val(None, model=model, labels=(), outputs=outputs) is None
