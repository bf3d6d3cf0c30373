"""Masks and data that cannot be used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import safetensors.numpy


class Ran(Protocol):
    code: int
    out: str
    err: str


Refused = Callable[..., str]


WIDE = (12, 8, 3, 3)


def wide_mask() -> np.ndarray[Any, Any]:
    """A mask for the eligible convolution: the first two of every four along C."""
    mask = np.zeros(WIDE, np.bool_)
    mask[:, np.arange(WIDE[1]) % 4 < 2] = True
    return mask


# --- masks


Masks = dict[str, np.ndarray[Any, Any]]


def foreign(mask: np.ndarray[Any, Any]) -> Masks:
    return {"layer1.0.conv1.weight": mask}


def of_another_shape(mask: np.ndarray[Any, Any]) -> Masks:
    return {"wide.weight": mask[:, :4]}


def not_2_to_4(mask: np.ndarray[Any, Any]) -> Masks:
    mask[5, :4, 1, 1] = (True, True, True, False)
    return {"wide.weight": mask}


def of_a_depthwise_layer(mask: np.ndarray[Any, Any]) -> Masks:
    return {"wide.weight": mask, "depthwise.weight": np.ones((12, 1, 3, 3), np.bool_)}


def of_floats(mask: np.ndarray[Any, Any]) -> Masks:
    return {"wide.weight": mask.astype(np.float32)}


def none_at_all(mask: np.ndarray[Any, Any]) -> Masks:
    return {}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (foreign, ("the masks are for another model", "1 of 1 names", "layer1.0.conv1.weight")),
        (of_another_shape, ("shape (12, 4, 3, 3), but the weight has (12, 8, 3, 3)",)),
        (not_2_to_4, ("wide.weight: 1 groups keep more than 2 of 4",)),
        (of_a_depthwise_layer, ("depthwise.weight", "grouped")),
        (of_floats, ("not a mask file", "wide.weight is F32")),
        (none_at_all, ("not a mask file", "no tensors")),
    ],
)
def test_masks_that_do_not_fit_are_refused(
    refused: Refused,
    tiny_spec: str,
    tmp_path: Path,
    spoil: Callable[[np.ndarray[Any, Any]], Masks],
    says: tuple[str, ...],
) -> None:
    safetensors.numpy.save_file(spoil(wide_mask()), tmp_path / "m.safetensors")

    message = refused("bake", tiny_spec, "--masks", "m.safetensors", "-o", "o.safetensors")

    for text in says:
        assert text in message


def test_engine_refuses_masks_that_are_not_2_to_4(refused: Refused, tiny_spec: str, tmp_path: Path) -> None:
    """It reads mask files with the function that `bake` uses; the other cases are tested there, where they are cheap."""
    safetensors.numpy.save_file(not_2_to_4(wide_mask()), tmp_path / "m.safetensors")

    message = refused("engine", tiny_spec, "--weights", "random", "--masks", "m.safetensors", "--out", "o")

    assert "wide.weight: 1 groups keep more than 2 of 4" in message


def test_masks_in_the_flat_layout_are_refused(
    refused: Refused, cli: Callable[..., Ran], tiny_spec: str, tmp_path: Path
) -> None:
    masks = tmp_path / "m.safetensors"
    assert cli("mask", tiny_spec, "--weights", "random", "--layout", "flat", "-o", masks).code == 0

    message = refused("bake", tiny_spec, "--masks", masks, "-o", "o.safetensors")

    assert "'flat' cannot be deployed" in message


@pytest.mark.parametrize("content", [None, b"", b"\x10\0\0\0\0\0\0\0{not json at all", b"x" * 100])
def test_a_mask_file_that_cannot_be_read_is_refused(
    refused: Refused, tiny_spec: str, tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "m.safetensors").write_bytes(content)

    assert "m.safetensors" in refused("bake", tiny_spec, "--masks", "m.safetensors", "-o", "o.safetensors")


def test_engine_lists_the_mask_methods_for_an_unknown_one(refused: Refused, tiny_spec: str, out: Path) -> None:
    message = refused("engine", tiny_spec, "--masks", "random", "--out", out)

    assert "unknown mask method 'random'" in message
    assert "learned" in message
    assert "magnitude" in message


def test_mask_refuses_an_unknown_method(refused: Refused, tiny_spec: str) -> None:
    assert "unknown mask method" in refused("mask", tiny_spec, "--method", "oracle", "-o", "m.safetensors")


@pytest.mark.parametrize("command", [("engine", "--masks"), ("mask", "--method")], ids=lambda c: c[0])
def test_learned_masks_need_images(refused: Refused, tiny_spec: str, command: tuple[str, str]) -> None:
    target = "--out" if command[0] == "engine" else "-o"

    message = refused(command[0], tiny_spec, command[1], "learned", target, "o.safetensors")

    assert "learned masks need images" in message
    assert "--data" in message


# --- data


def no_folder(data: Path) -> None:
    shutil.rmtree(data)


def empty_folder(data: Path) -> None:
    shutil.rmtree(data)
    data.mkdir()


def no_val(data: Path) -> None:
    shutil.rmtree(data / "val")


def loose_images(data: Path) -> None:
    for file in sorted((data / "train").rglob("*.png")):
        file.rename(data / "train" / f"{file.parent.name}-{file.name}")
    for folder in list((data / "train").iterdir()):
        if folder.is_dir():
            folder.rmdir()


def an_empty_class(data: Path) -> None:
    for file in (data / "train" / "green").iterdir():
        file.unlink()


def another_class_in_val(data: Path) -> None:
    (data / "val" / "green").rename(data / "val" / "yellow")


def classes_txt_of_others(data: Path) -> None:
    (data / "classes.txt").write_text("blue\ngreen\nyellow\n")


def four_classes(data: Path) -> None:
    for part in ("train", "val"):
        shutil.copytree(data / part / "red", data / part / "yellow")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (no_folder, ("data folder not found", "train/CLASS")),
        (empty_folder, ("no train/ in the data folder", "nothing")),
        (no_val, ("no val/ in the data folder", "train")),
        (loose_images, ("no class folders and 60 loose images",)),
        (an_empty_class, ("green",)),
        (another_class_in_val, ("only in train: green", "only in val: yellow")),
        (classes_txt_of_others, ("classes.txt", "not listed: red", "without a folder: yellow")),
        (four_classes, ("4 class folders, 3 model outputs", "--classes 4")),
    ],
)
def test_a_data_folder_laid_out_wrongly_is_refused(
    refused: Refused, tiny_spec: str, data: Path, out: Path, spoil: Callable[[Path], None], says: tuple[str, ...]
) -> None:
    spoil(data)

    message = refused("engine", tiny_spec, "--weights", "random", "--data", data, "--out", out)

    for text in says:
        assert text in message


def test_corrupt_images_are_counted_and_the_first_few_named(
    refused: Refused, tiny_spec: str, data: Path, out: Path
) -> None:
    folder = data / "val" / "blue"
    whole = (folder / "00.png").read_bytes()
    (folder / "00.png").write_bytes(b"")
    (folder / "01.png").write_bytes(b"no image")
    (folder / "02.png").write_bytes(whole[: len(whole) // 2])
    (folder / "03.png").write_bytes(whole[:8] + b"\xff" * 40 + whole[48:])
    for i in range(4, 7):
        (folder / f"{i:02}.png").write_bytes(b"\x89PNG")

    message = refused("engine", tiny_spec, "--weights", "random", "--data", data, "--out", out)

    assert "7 of 24 val images cannot be decoded" in message
    assert ", ".join(f"blue/{i:02}.png" for i in range(5)) + " and 2 more" in message


def test_validation_images_that_were_trained_on_are_refused(
    refused: Refused, tiny_spec: str, data: Path, out: Path
) -> None:
    for i in range(4):
        shutil.copy(data / "train" / "red" / f"{i:02}.png", data / "val" / "red" / f"{i:02}.png")

    message = refused("engine", tiny_spec, "--weights", "random", "--data", data, "--out", out)

    assert "val images were also used to make the model" in message


@pytest.mark.parametrize(
    "command",
    [
        ("mask", "--method", "learned", "-o", "m.safetensors", "--data"),
        ("bake", "--masks", "m.safetensors", "-o", "b.safetensors", "--recalibrate"),
    ],
    ids=lambda c: c[0],
)
def test_every_command_that_reads_images_refuses_a_missing_folder(
    refused: Refused, tiny_spec: str, command: tuple[str, ...]
) -> None:
    assert "data folder not found" in refused(command[0], tiny_spec, *command[1:], "nowhere")


def test_compare_refuses_a_missing_data_folder(refused: Refused, finished_digits: Path) -> None:
    sides = (finished_digits / "dense_engine.onnx", finished_digits / "engine.onnx")

    assert "data folder not found" in refused("compare", *sides, "--data", "nowhere")


def test_compare_refuses_data_of_another_class_count(refused: Refused, finished_digits: Path, toy_data: Path) -> None:
    sides = (finished_digits / "dense_engine.onnx", finished_digits / "engine.onnx")

    assert "3 class folders, 10 model outputs" in refused("compare", *sides, "--data", toy_data)
