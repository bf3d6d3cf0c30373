"""Classes that models and data number differently, by their names and by their answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from maskplan.pipeline.core.artifacts import Preprocessing, Provenance
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import ImageFiles, Split
from maskplan.pipeline.parity.class_order import class_names, looks_reordered, require_same_class_order

HOW = Preprocessing(3, 4, 4, 0, "nearest", (0.0,) * 3, (1.0,) * 3)
ANIMALS = ("cat", "dog", "eel", "fox")


def made(*labels: str) -> Provenance:
    return Provenance("net", True, "test", "0" * 64, 4, labels, HOW)


def folders(*names: str) -> Split:
    """Two images a folder, numbered in the order given."""
    files = tuple(f"{name}/{i}.png" for name in sorted(names) for i in range(2))
    labels = np.array([names.index(file.partition("/")[0]) for file in files])
    return Split("val", ImageFiles(Path(), files, labels), np.arange(len(files)))


def test_records_in_one_order_and_those_that_say_nothing_pass() -> None:
    for pair in ((made(*ANIMALS), made(*ANIMALS)), (made(*ANIMALS), None), (made(), made(*ANIMALS)), (None, None)):
        for images in (None, folders(*ANIMALS)):
            require_same_class_order(images, pair)


def test_records_in_two_orders_are_refused_and_both_are_told() -> None:
    with pytest.raises(InputError, match="not in the same order") as caught:
        require_same_class_order(None, [made(*ANIMALS), made("dog", "cat", "eel", "fox")])
    assert "the dense model: cat, dog, eel, fox; the sparse model: dog, cat, eel, fox; 2 differ" in str(caught.value)


def test_folders_in_another_order_than_either_model_are_refused() -> None:
    turned = ANIMALS[::-1]
    for pair in ([made(*ANIMALS), None], [None, made(*ANIMALS)], [made(*ANIMALS), made(*ANIMALS)]):
        with pytest.raises(InputError, match="the data's folders: fox, eel, dog, cat"):
            require_same_class_order(folders(*turned), pair)


def test_one_shifted_class_among_others_of_other_names_is_refused() -> None:
    """An extra class at the front moves every other; the names that both know tell."""
    with pytest.raises(InputError, match="for example 'cat'"):
        require_same_class_order(folders("background", *ANIMALS[:3]), [made(*ANIMALS), None])


def test_names_that_only_one_of_them_knows_prove_nothing() -> None:
    require_same_class_order(folders("n01", "n02", "n03", "n04"), [made(*ANIMALS), made(*ANIMALS)])


def test_names_come_from_the_folders_before_the_records() -> None:
    assert class_names(folders("n02", "n01"), [made(*ANIMALS)]) == ("n02", "n01")
    assert class_names(None, [None, made(*ANIMALS)]) == ANIMALS
    assert class_names(None, [None, None]) == ()


def drawn(count: int, classes: int, right: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and top-1 predictions of which a share is right and the rest is chance."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    chance = generator.integers(0, classes, count)
    return np.where(generator.random(count) < right, labels, chance).astype(np.int32), labels


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_a_good_model_with_turned_names_is_caught(classes: int) -> None:
    first, labels = drawn(2000, classes, 0.8)
    turned = np.roll(np.arange(classes), 1)[first].astype(np.int32)
    found = looks_reordered(turned, labels)
    assert found is not None
    assert found[0] == pytest.approx(100 * (turned == labels).mean())
    assert found[1] == pytest.approx(100 * (first == labels).mean(), abs=6 if classes == 100 else 1)


@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
@pytest.mark.parametrize("right", [0.0, 0.05, 0.4, 0.95])
def test_models_that_know_their_names_are_not_suspected_however_bad(classes: int, right: float) -> None:
    """A thousand classes with five images each: naming outputs after their own images would find an order in chance."""
    for seed in range(5):
        assert looks_reordered(*drawn(5000, classes, right, seed)) is None


def test_a_model_that_says_one_class_only_is_bad_and_not_reordered() -> None:
    labels = np.array([0] * 800 + [1] * 50 + [2] * 150)
    for said in range(3):
        assert looks_reordered(np.full(1000, said, np.int32), labels) is None


def test_few_images_are_no_proof() -> None:
    labels = np.array([0, 1, 2] * 4)
    assert looks_reordered(((labels + 1) % 3).astype(np.int32), labels) is None


def test_records_of_another_length_are_no_reason_to_fail_here() -> None:
    """How many outputs there are is judged elsewhere."""
    longer = dataclasses.replace(made(*ANIMALS, "gnu"), classes=5)
    require_same_class_order(None, [made(*ANIMALS), longer])
