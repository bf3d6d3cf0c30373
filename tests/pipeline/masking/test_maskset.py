"""Mask files: they round-trip, and masks that do not fit are refused with all problems counted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from maskplan.pipeline.core.artifacts import DenseLayer, ImageSet, Layer, Learning, MaskSet, Pattern
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.masking.maskset import NOT_IN_FILE, load_masks, read_masks, write_masks
from maskplan.pipeline.models.state_dict import read_metadata

Masks = dict[str, npt.NDArray[np.bool_]]

LAYERS = (
    Layer("stem.weight", "Conv", (8, 3, 3, 3), 1, 0, 1000),
    Layer("last.weight", "Conv", (6, 12, 1, 1), 1, 3, 4000),
    Layer("wide.weight", "Conv", (12, 8, 3, 3), 1, 1, 2000),
    Layer("depthwise.weight", "Conv", (12, 1, 3, 3), 12, 2, 3000),
    Layer("spare.weight", "Conv", (4, 8, 1, 1), 1, None, 0),
    Layer("head.weight", "Gemm", (3, 8), 1, 4, 24),
)
SHAPES = {layer.name: layer.shape for layer in LAYERS}
TWO_FOUR = Pattern(2, 4)


@pytest.fixture
def weights() -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def masks(weights: Mapping[str, npt.NDArray[np.float32]]) -> Masks:
    return {name: magnitude_mask(weights[name], TWO_FOUR) for name in ("wide.weight", "last.weight")}


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """Write tensors as a mask file; keyword arguments become maskplan's header."""

    def save(tensors: Mapping[str, npt.NDArray[Any]], **header: object) -> Path:
        path = tmp_path / "given.safetensors"
        metadata = {"maskplan": json.dumps(header)} if header else None
        safetensors.numpy.save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, path, metadata)
        return path

    return save


@pytest.fixture
def read(weights: Mapping[str, npt.NDArray[np.float32]]) -> Callable[..., MaskSet]:
    return lambda path, **options: read_masks(path, weights, LAYERS, model="net", **options)


def write(out: Path, masks: Masks, weights: Mapping[str, npt.NDArray[np.float32]], **changes: Any) -> MaskSet:
    options: dict[str, Any] = {
        "model": "net",
        "pattern": TWO_FOUR,
        "layout": "channel",
        "method": "magnitude",
        "weights_sha256": "ab" * 32,
    }
    chosen = [layer for layer in LAYERS if layer.name in masks]
    dense = (DenseLayer("head.weight", (3, 8), 24, "linear"),)
    return write_masks(out, masks, weights, chosen, dense, **(options | changes))


def test_masks_round_trip_through_a_file(
    tmp_path: Path, masks: Masks, weights: dict[str, npt.NDArray[np.float32]], read: Callable[..., MaskSet]
) -> None:
    images = (ImageSet("train", 7, "cd" * 32, ("0" * 16, "f" * 16)),)
    written = write(tmp_path / "m.safetensors", masks, weights, method="learned", image_sets=images)
    back = read(written.path)
    assert back.sha256 == written.sha256 == hashlib.sha256(written.path.read_bytes()).hexdigest()
    for field in ("path", "model", "pattern", "layout", "method", "weights_sha256", "masked", "image_sets"):
        assert getattr(back, field) == getattr(written, field), field
    loaded = load_masks(written.path)
    assert loaded.keys() == masks.keys()
    assert all(np.array_equal(loaded[name], masks[name]) and loaded[name].dtype == np.bool_ for name in masks)


def test_the_header_records_the_origin_of_the_masks(
    tmp_path: Path, masks: Masks, weights: dict[str, npt.NDArray[np.float32]]
) -> None:
    images = (ImageSet("select", 1, "ef" * 32, ("1" * 16,)),)
    written = write(tmp_path / "m.safetensors", masks, weights, image_sets=images, permutation="cd" * 32)
    assert read_metadata(written.path) == {
        "model": "net",
        "pattern": "2:4",
        "layout": "channel",
        "method": "magnitude",
        "weights_sha256": "ab" * 32,
        "image_sets": [
            {
                "role": "select",
                "images": 1,
                "sha256": "ef" * 32,
                "sketch": ["1" * 16],
                "members": "",
                "labeled_sha256": "",
            }
        ],
        "permutation": "cd" * 32,
    }


def test_the_bytes_do_not_depend_on_order_or_folder(
    tmp_path: Path, masks: Masks, weights: dict[str, npt.NDArray[np.float32]]
) -> None:
    first = write(tmp_path / "a" / "m.safetensors", masks, weights)
    second = write(tmp_path / "b" / "other.safetensors", dict(reversed(masks.items())), weights)
    assert first.path.read_bytes() == second.path.read_bytes()


def test_the_record_of_learning_is_kept(
    tmp_path: Path, masks: Masks, weights: dict[str, npt.NDArray[np.float32]]
) -> None:
    learning = Learning("maskplan", 1, 2, 3, 4.0, 0.5, 1.0, 0.9, 50.0, 60.0)
    assert write(tmp_path / "m.safetensors", masks, weights, learning=learning).learning == learning


def test_masked_layers_come_in_forward_order_with_the_share_they_keep(
    tmp_path: Path, masks: Masks, weights: dict[str, npt.NDArray[np.float32]]
) -> None:
    worst = {name: ~mask for name, mask in masks.items()}
    described = write(tmp_path / "m.safetensors", worst, weights).masked
    assert [layer.name for layer in described] == ["wide.weight", "last.weight"]
    for layer in described:
        weight = np.abs(weights[layer.name].astype(np.float64))
        assert layer.kept == pytest.approx(weight[worst[layer.name]].sum() / weight.sum())
        assert layer.kept_best == pytest.approx(weight[masks[layer.name]].sum() / weight.sum())
        assert layer.kept < 0.5 < layer.kept_best
        assert layer.groups == weight.size // 4
        assert (layer.shape, layer.macs) == next((x.shape, x.macs) for x in LAYERS if x.name == layer.name)


def test_the_flat_layout_counts_a_padded_last_group(
    tmp_path: Path, weights: dict[str, npt.NDArray[np.float32]]
) -> None:
    flat = {"stem.weight": magnitude_mask(weights["stem.weight"], TWO_FOUR, "flat")}
    (layer,) = write(tmp_path / "m.safetensors", flat, weights, layout="flat").masked
    assert layer.groups == 8 * 7
    assert layer.kept == layer.kept_best


def test_masks_of_another_tool_need_no_metadata(
    file: Callable[..., Path], masks: Masks, read: Callable[..., MaskSet]
) -> None:
    taken = read(file(masks))
    assert (taken.model, taken.pattern, taken.layout) == ("net", TWO_FOUR, "channel")
    assert (taken.method, taken.weights_sha256, taken.image_sets) == ("file given.safetensors", "", ())
    assert [layer.name for layer in taken.masked] == ["wide.weight", "last.weight"]


def test_layers_without_a_mask_are_dense_for_a_reason(
    file: Callable[..., Path], masks: Masks, read: Callable[..., MaskSet]
) -> None:
    del masks["last.weight"]
    assert {layer.name: layer.reason for layer in read(file(masks)).dense} == {
        "stem.weight": "channels_not_multiple_of_4",
        "last.weight": NOT_IN_FILE,
        "depthwise.weight": "grouped",
        "spare.weight": "not_used_in_inference",
        "head.weight": NOT_IN_FILE,
    }


def test_a_file_may_mask_layers_that_the_policy_leaves_dense(
    file: Callable[..., Path], read: Callable[..., MaskSet]
) -> None:
    head = np.tile([True, True, False, False], (3, 2))
    assert [layer.name for layer in read(file({"head.weight": head})).masked] == ["head.weight"]


def test_fewer_than_n_in_a_group_is_2_4(file: Callable[..., Path], masks: Masks, read: Callable[..., MaskSet]) -> None:
    masks["wide.weight"][:, 4:] = False
    assert len(read(file(masks)).masked) == 2


def test_the_header_sets_the_pattern(file: Callable[..., Path], read: Callable[..., MaskSet]) -> None:
    three = np.tile([True, True, True, False], (3, 2))
    assert read(file({"head.weight": three}, pattern="3:4")).pattern == Pattern(3, 4)
    with pytest.raises(InputError, match="6 groups keep more than 2 of 4"):
        read(file({"head.weight": three}, pattern="2:4"))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mask file not found") as raised:
        load_masks(tmp_path / "none.safetensors")
    assert raised.value.where == tmp_path / "none.safetensors"


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path, file: Callable[..., Path], masks: Masks) -> None:
    whole = file(masks, pattern="2:4").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(0, len(whole), 13):
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError, match="cannot be read") as raised:
            load_masks(cut)
        assert raised.value.where == cut


def test_a_file_of_other_bytes_is_an_error(tmp_path: Path) -> None:
    other = tmp_path / "masks.safetensors"
    other.write_bytes(b"bool tensors, honestly" * 40)
    with pytest.raises(InputError, match="cannot be read"):
        load_masks(other)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.uint8, torch.int64, torch.bfloat16, torch.float8_e4m3fn],
    ids=str,
)
def test_tensors_that_are_not_bool_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    """As when a checkpoint is given for masks, whatever its type."""
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"wide.weight": torch.ones(SHAPES["wide.weight"]).to(dtype)}, path)
    with pytest.raises(InputError) as raised:
        load_masks(path)
    assert raised.value.where == path


def test_non_bool_tensors_are_named_with_their_type(file: Callable[..., Path], masks: Masks) -> None:
    path = file({**masks, "a": np.ones(4, np.int8), "b": np.ones(4, np.float32)})
    with pytest.raises(InputError, match="not a mask file") as raised:
        load_masks(path)
    assert set(str(raised.value.found).split(", ")) == {"a is I8", "b is F32"}


def test_a_file_without_tensors_is_refused(file: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="not a mask file") as raised:
        load_masks(file({}, pattern="2:4"))
    assert raised.value.found == "no tensors"


def test_masks_of_another_model_are_counted_and_the_first_named(
    file: Callable[..., Path], masks: Masks, read: Callable[..., MaskSet]
) -> None:
    strangers = {f"layer{i}.weight": np.ones((4, 4), np.bool_) for i in range(7)}
    with pytest.raises(InputError, match="for another model") as raised:
        read(file(masks | strangers))
    found = str(raised.value.found)
    assert "7 of 9 names" in found
    assert "layer0.weight" in found
    assert "layer6.weight" not in found
    assert "and 2 more" in found


def test_all_invalid_masks_are_counted_in_one_message(file: Callable[..., Path], read: Callable[..., MaskSet]) -> None:
    dense = np.ones(SHAPES["wide.weight"], np.bool_)
    offenders = {
        "wide.weight": dense,
        "last.weight": np.zeros((6, 12), np.bool_),
        "depthwise.weight": np.zeros(SHAPES["depthwise.weight"], np.bool_),
        "stem.weight": np.zeros(SHAPES["stem.weight"], np.bool_),
        "head.weight": np.zeros(SHAPES["head.weight"], np.bool_),
    }
    with pytest.raises(InputError, match="4 of 5 masks cannot be used") as raised:
        read(file(offenders))
    assert "and 1 more" in str(raised.value.found)


@pytest.mark.parametrize(
    ("name", "mask", "expected"),
    [
        ("wide.weight", np.ones((12, 8, 3, 3), np.bool_), "wide.weight: 216 groups keep more than 2 of 4"),
        ("last.weight", np.zeros((6, 12), np.bool_), "last.weight: shape (6, 12), but the weight has (6, 12, 1, 1)"),
        ("depthwise.weight", np.zeros((12, 1, 3, 3), np.bool_), "depthwise.weight: the layer cannot be 2:4 (grouped)"),
        ("stem.weight", np.zeros((8, 3, 3, 3), np.bool_), "(channels_not_multiple_of_4)"),
    ],
)
def test_each_kind_of_invalid_mask_is_explained(
    file: Callable[..., Path], read: Callable[..., MaskSet], name: str, mask: npt.NDArray[np.bool_], expected: str
) -> None:
    with pytest.raises(InputError, match="1 of 1 masks") as raised:
        read(file({name: mask}))
    assert expected in str(raised.value.found)


def test_one_invalid_group_is_an_error(file: Callable[..., Path], masks: Masks, read: Callable[..., MaskSet]) -> None:
    full = masks["wide.weight"]
    full[11, np.flatnonzero(~full[11, 4:, 2, 2])[0] + 4, 2, 2] = True
    with pytest.raises(InputError, match=r"wide\.weight: 1 groups keep more"):
        read(file(masks))


def test_the_flat_layout_is_refused_for_deployment_and_read_for_comparison(
    file: Callable[..., Path], weights: dict[str, npt.NDArray[np.float32]], read: Callable[..., MaskSet]
) -> None:
    path = file({"wide.weight": magnitude_mask(weights["wide.weight"], TWO_FOUR, "flat")}, layout="flat")
    with pytest.raises(InputError, match="'flat' cannot be deployed") as raised:
        read(path)
    assert "along C" in str(raised.value.fix)
    assert read(path, deployable=False).layout == "flat"


def test_flat_masks_are_not_2_4_along_c(
    file: Callable[..., Path], weights: dict[str, npt.NDArray[np.float32]], read: Callable[..., MaskSet]
) -> None:
    with pytest.raises(InputError, match="keep more than 2 of 4"):
        read(file({"wide.weight": magnitude_mask(weights["wide.weight"], TWO_FOUR, "flat")}))


@pytest.mark.parametrize(
    "header",
    [
        {"pattern": "two of four"},
        {"pattern": "2:4", "layout": "diagonal"},
        {"image_sets": [{"role": "train"}]},
        {"image_sets": [5]},
        {"image_sets": 5},
        {"image_sets": [{"role": "train", "images": "many", "sha256": "", "sketch": []}]},
    ],
    ids=str,
)
def test_an_invalid_header_is_an_error(
    file: Callable[..., Path], masks: Masks, read: Callable[..., MaskSet], header: dict[str, Any]
) -> None:
    with pytest.raises(InputError):
        read(file(masks, **header), deployable=False)


@pytest.mark.parametrize("text", ["not json", "[1, 2]", "5"])
def test_metadata_that_is_not_a_json_object_is_an_error(
    tmp_path: Path, masks: Masks, read: Callable[..., MaskSet], text: str
) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file(masks, path, {"maskplan": text})
    with pytest.raises(InputError, match="cannot be read"):
        read(path)
