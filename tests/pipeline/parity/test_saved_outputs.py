"""Saved outputs are read back unchanged, and only for the same model, images and preprocessing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy

from maskplan.pipeline.core.artifacts import ImageSet, Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import Split
from maskplan.pipeline.parity.model_outputs import ModelOutputs
from maskplan.pipeline.parity.saved_outputs import OutputsKey, load_outputs, outputs_key, save_outputs

HOW = Preprocessing(3, 4, 4, 0, "nearest", (0.25,) * 3, (0.5,) * 3)
SET = ImageSet("val", 4, "7" * 64, ())
RNG = np.random.default_rng(0)
SAID = ModelOutputs(
    RNG.normal(size=(3, 5)).astype(np.float32),
    RNG.integers(0, 5, 4).astype(np.int32),
    np.array([1, 0, 1, 1], bool),
    True,
)


@dataclass(frozen=True)
class Named:
    names: tuple[str, ...]
    labels: npt.NDArray[np.int64]

    def name(self, index: int) -> str:
        return self.names[index]

    def read(self, index: int) -> bytes:
        raise AssertionError


def asked(
    names: str = "abcd", labels: tuple[int, ...] = (0, 1, 2, 3), order: tuple[int, ...] = (0, 1, 2, 3)
) -> OutputsKey:
    split = Split("val", Named(tuple(names), np.array(labels)), np.array(order))
    return outputs_key("1" * 64, HOW, split, SET, 3)


@pytest.mark.parametrize("finite", [True, False])
def test_saved_outputs_are_read_back_unchanged(finite: bool, tmp_path: Path) -> None:
    said = replace(SAID, finite=finite)
    if not finite:
        said.fixed_logits[0, 0] = np.nan
    save_outputs(tmp_path / "d", asked(), said)
    found = load_outputs(tmp_path / "d", asked())
    for name in ("fixed_logits", "top1", "in_top5"):
        mine, theirs = getattr(found, name), getattr(said, name)
        assert mine.dtype == theirs.dtype
        assert np.array_equal(mine, theirs, equal_nan=name == "fixed_logits")
    assert found.finite is finite


def test_the_same_answers_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_outputs(tmp_path / name, asked(), SAID)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (replace(asked(), model_sha256="2" * 64), "the dense model is a different file"),
        (replace(asked(), preprocessing=replace(HOW, mean=(0.0,) * 3)), "the preprocessing is different"),
        (asked(names="abce"), "the images or their labels are different"),
        (asked(labels=(0, 1, 3, 2)), "the images or their labels are different"),
        (asked(order=(1, 0, 2, 3)), "the images or their labels are different"),
        (outputs_key("1" * 64, HOW, None, None, 3), "the images or their labels are different"),
        (replace(asked(), fixed_images=4), "4 fixed images are requested, 3 are saved"),
    ],
)
def test_outputs_saved_under_another_key_are_refused(other: OutputsKey, told: str, tmp_path: Path) -> None:
    save_outputs(tmp_path / "d", asked(), SAID)
    with pytest.raises(InputError, match=told):
        load_outputs(tmp_path / "d", other)


def test_every_difference_is_told_at_once(tmp_path: Path) -> None:
    save_outputs(tmp_path / "d", asked(), SAID)
    with pytest.raises(InputError) as caught:
        load_outputs(tmp_path / "d", replace(asked(), model_sha256="2" * 64, fixed_images=9))
    assert "different file; 9 fixed images" in str(caught.value)


def spoilt(**changes: Any) -> bytes:
    tensors = {"fixed": SAID.fixed_logits, "first": SAID.top1, "in_top5": SAID.in_top5} | changes
    return safetensors.numpy.save({k: v for k, v in tensors.items() if v is not None}, {"maskplan": "{}"})


@pytest.mark.parametrize(
    "content",
    [None, b"", b"rubbish" * 9, spoilt(), safetensors.numpy.save({"w": SAID.fixed_logits}), spoilt(first=None)],
)
def test_what_is_no_such_file_is_one_error(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_outputs(path, asked())
    assert "d.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"first": np.zeros(4, np.int64)},
        {"first": np.zeros(3, np.int32)},
        {"fixed": np.zeros(5, np.float32)},
        {"in_top5": np.zeros(4, np.uint8)},
    ],
)
def test_tensors_of_another_shape_or_type_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "d"
    save_outputs(path, asked(), SAID)
    with safetensors.safe_open(path, "np") as file:
        header = file.metadata()
    tensors = {"fixed": SAID.fixed_logits, "first": SAID.top1, "in_top5": SAID.in_top5} | changes
    path.write_bytes(safetensors.numpy.save(tensors, header))
    with pytest.raises(InputError, match="not a file of saved results"):
        load_outputs(path, asked())
