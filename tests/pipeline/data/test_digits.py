"""The bundled digits and their network, against scikit-learn's own arrays."""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from sklearn import datasets
from torch import nn
from torch.nn import functional as F

from maskplan.pipeline.core.errors import HostError
from maskplan.pipeline.data.dataset import Split, batches
from maskplan.pipeline.data.digits import CLASSES, PREPROCESSING, load_digits
from maskplan.pipeline.data.image_sets import identify, require_disjoint
from maskplan.pipeline.models.digits_resnet import DigitsResNet
from maskplan.pipeline.models.registry import BUNDLED_WEIGHTS
from maskplan.pipeline.models.state_dict import read_metadata

PARTS = ("train", "select", "val")


def part(name: str) -> Split:
    found = getattr(load_digits(), name)
    assert isinstance(found, Split)
    return found


@pytest.fixture(scope="module")
def pixels() -> npt.NDArray[np.float64]:
    """scikit-learn's (1797, 8, 8), 0 to 16."""
    return np.asarray(datasets.load_digits().images)


@pytest.fixture(scope="module")
def labels() -> npt.NDArray[np.int64]:
    return np.asarray(datasets.load_digits().target)


@pytest.fixture
def shipped() -> DigitsResNet:
    module = DigitsResNet()
    module.load_state_dict(safetensors.torch.load_file(BUNDLED_WEIGHTS))
    return module.eval()


def test_the_parts_are_disjoint_and_cover_all_digits(pixels: npt.NDArray[np.float64]) -> None:
    indices = np.concatenate([part(name).indices for name in PARTS])
    assert np.array_equal(np.sort(indices), np.arange(len(pixels)))
    assert [part(name).role for name in PARTS] == list(PARTS)


def test_no_image_is_in_two_parts_under_different_indices(pixels: npt.NDArray[np.float64]) -> None:
    contents = [{pixels[i].tobytes() for i in part(name).indices} for name in PARTS]
    assert not contents[0] & contents[1]
    assert not contents[0] & contents[2]
    assert not contents[1] & contents[2]


def test_a_fifth_of_each_class_is_val_and_a_tenth_of_the_rest_is_select(
    labels: npt.NDArray[np.int64],
) -> None:
    for label in range(10):
        count = (labels == label).sum()
        train, select, val = ((part(name).labels == label).sum() for name in PARTS)
        assert abs(val - count / 5) <= 0.5
        assert abs(select - (train + select) / 10) <= 0.5


@pytest.mark.parametrize("name", PARTS)
def test_images_and_labels_are_those_of_scikit_learn(
    name: str, pixels: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]
) -> None:
    split = part(name)
    assert np.array_equal(split.labels, labels[split.indices])
    read = list(batches(split, PREPROCESSING, 100))
    assert np.array_equal(np.concatenate([y for _, y in read]), labels[split.indices])
    x = np.concatenate([x for x, _ in read])
    assert x.shape == (len(split), 1, 8, 8)
    # 17 shades of 16 steps become 256 shades: off by half a shade at most.
    expected = (pixels[split.indices, None] / 16 - PREPROCESSING.mean[0]) / PREPROCESSING.std[0]
    assert np.abs(x - expected).max() <= 0.51 / 255 / PREPROCESSING.std[0]


def test_the_split_is_the_same_each_time() -> None:
    again = load_digits.__wrapped__()
    assert again.classes == CLASSES
    for name in PARTS:
        assert np.array_equal(getattr(again, name).indices, part(name).indices)
        assert identify(getattr(again, name)) == identify(part(name))


def test_normalized_training_images_have_mean_0_and_deviation_1() -> None:
    x = np.concatenate([x for x, _ in batches(part("train"), PREPROCESSING, 500)])
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(HostError, match="scikit-learn") as raised:
        load_digits.__wrapped__()
    assert "pip install scikit-learn" in str(raised.value.fix)
    assert "--data" in str(raised.value.fix)


def test_the_shipped_files_are_small_and_belong_together() -> None:
    data = BUNDLED_WEIGHTS.read_bytes()
    figures = json.loads(BUNDLED_WEIGHTS.with_suffix(".json").read_text())
    assert len(data) < 500_000
    assert figures["bytes"] == len(data)
    assert figures["sha256"] == hashlib.sha256(data).hexdigest()
    assert figures["val_images"] == len(part("val"))


@pytest.mark.parametrize("name", ["select", "val"])
def test_the_accuracy_beside_the_weights_is_what_the_model_reaches(
    shipped: DigitsResNet, name: str, pixels: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]
) -> None:
    """Read, scaled and counted here, from scikit-learn's arrays."""
    indices = part(name).indices
    scaled = np.round(pixels[indices, None] * 255 / 16) / 255
    x = torch.from_numpy((scaled - PREPROCESSING.mean[0]) / PREPROCESSING.std[0]).float()
    with torch.no_grad():
        right = int((shipped(x).argmax(dim=1).numpy() == labels[indices]).sum())
    figures = json.loads(BUNDLED_WEIGHTS.with_suffix(".json").read_text())
    assert figures[f"{name}_top1"] == pytest.approx(100 * right / len(indices), abs=1e-9)
    assert right / len(indices) >= 0.98


def test_the_shipped_weights_name_their_training_images_which_do_not_include_val() -> None:
    written = read_metadata(BUNDLED_WEIGHTS)
    assert written is not None
    shaped = [identify(part(name)) for name in ("train", "select")]
    assert [(s["role"], s["images"], s["sha256"]) for s in written["image_sets"]] == [
        (s.role, s.images, s.sha256) for s in shaped
    ]
    require_disjoint(identify(part("val")), shaped)
    assert (written["model"], written["trained"], written["origin"]) == ("digits_resnet", True, "bundled")
    assert written["masked"] == []


def test_the_shipped_weights_are_dense_and_finite() -> None:
    for name, tensor in safetensors.torch.load_file(BUNDLED_WEIGHTS).items():
        assert tensor.isfinite().all(), name
        if tensor.dim() > 1:
            assert (tensor != 0).float().mean() > 0.95, name


def by_hand(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The network from its description: a stem, three blocks with a shortcut, the mean, a head."""

    def norm(name: str, y: torch.Tensor) -> torch.Tensor:
        mean, var, scale, shift = (
            state[f"{name}.{p}"][:, None, None] for p in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / (var + 1e-5).sqrt() * scale + shift

    y = norm("bn", F.conv2d(x, state["stem.weight"], padding=1)).relu()
    for i, stride in enumerate((1, 2, 2)):
        name = f"blocks.{i}"
        inner = norm(f"{name}.bn1", F.conv2d(y, state[f"{name}.conv1.weight"], stride=stride, padding=1)).relu()
        inner = norm(f"{name}.bn2", F.conv2d(inner, state[f"{name}.conv2.weight"], padding=1))
        if stride == 2:
            y = norm(f"{name}.shortcut.1", F.conv2d(y, state[f"{name}.shortcut.0.weight"], stride=2))
        y = (inner + y).relu()
    return y.mean((2, 3)) @ state["head.weight"].T + state["head.bias"]


def test_the_network_is_the_one_described(shipped: DigitsResNet) -> None:
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = shipped(x)
    state = {name: tensor.double() for name, tensor in shipped.state_dict().items()}
    assert found.numpy() == pytest.approx(by_hand(state, x.double()).numpy(), rel=1e-4, abs=1e-4)
    in_blocks = [m for m in shipped.blocks.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(in_blocks) == 6


@pytest.mark.parametrize("classes", [1, 7])
def test_the_number_of_classes_can_be_chosen(classes: int) -> None:
    module = DigitsResNet(classes).eval()
    assert module(torch.zeros(3, 1, 8, 8)).shape == (3, classes)
