"""Learning from few images: which images are used, which options change, and what features are compared."""

from __future__ import annotations

import copy
import dataclasses
import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from maskplan.pipeline.core.artifacts import Pattern, Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import Dataset
from maskplan.pipeline.data.digits import load_digits
from maskplan.pipeline.data.few_images import limit_images
from maskplan.pipeline.learning.features import FeatureMatcher, find_features
from maskplan.pipeline.learning.few_images import FEW_IMAGES, few_image_options, is_few, learns_from_few
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.learning.trainer import learn_masks
from maskplan.pipeline.masking.magnitude import magnitude_mask

HOW = Preprocessing(1, 8, 8, 0, "bilinear", (0.5,), (0.25,))


class Counted:
    """The images of the digits; notes which are read."""

    def __init__(self, images: Any) -> None:
        self.images, self.reads = images, set[int]()

    @property
    def labels(self) -> Any:
        return self.images.labels

    def name(self, index: int) -> str:
        return str(self.images.name(index))

    def read(self, index: int) -> bytes:
        self.reads.add(index)
        return bytes(self.images.read(index))


def counted_digits() -> tuple[Dataset, Counted]:
    digits = load_digits()
    images = Counted(digits.train.images)
    parts = (type(p)(p.role, images, p.indices) for p in (digits.train, digits.select, digits.val))
    return Dataset(digits.classes, *parts), images


def small_net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()


def test_no_more_images_are_read_than_allowed() -> None:
    """By learning, by its evaluations, and by their BatchNorm statistics."""
    data, images = counted_digits()
    limited = limit_images(data, 64, seed=3)
    net = small_net()
    masks = {"3.weight": magnitude_mask(net[3].weight.detach().numpy(), Pattern(2, 4))}
    options = LearnOptions(epochs=2, batch=8, match_features=1.0)
    learn_masks(net, masks, Pattern(2, 4), HOW, limited, options, device="cpu")
    allowed = set(limited.train.indices) | set(limited.select.indices)
    assert images.reads == allowed
    assert len(allowed) == 64
    assert not set(limited.train.indices) & set(limited.select.indices)


@pytest.mark.parametrize(("images", "epochs"), [(10, 400), (300, 400), (1000, 120), (8192, 15), (0, 400)])
def test_the_passes_over_few_images_are_limited_in_all_and_for_each(images: int, epochs: int) -> None:
    assert few_image_options(LearnOptions(), images).epochs == epochs
    assert few_image_options(LearnOptions(epochs=7), images).epochs == 7


def test_the_seed_draws_the_images_and_val_stays_whole() -> None:
    data, _ = counted_digits()
    first, same, other = (limit_images(data, 100, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.train.indices, same.train.indices)
    assert not np.array_equal(first.train.indices, other.train.indices)
    assert (len(first.train), len(first.select)) == (88, 12)
    assert first.val is data.val
    assert limit_images(data, 10**6, 0) is data
    with pytest.raises(InputError, match="too few images"):
        limit_images(data, 15, 0)


def test_only_options_that_are_defaults_change() -> None:
    changed = few_image_options(LearnOptions(lr=0.05, seed=4), 1000)
    assert (changed.lr, changed.seed, changed.match_features, changed.epochs) == (0.05, 4, 1.0, 120)
    assert few_image_options(LearnOptions(budget_minutes=5), 1000).epochs == 200
    assert few_image_options(LearnOptions(epochs=2), 1000).epochs == 2
    defaults = ("match_blocks", "augment")
    kept = few_image_options(LearnOptions(), 1000, defaults)
    assert (kept.match_blocks, kept.augment, kept.match_features) == (0.0, "none", 1.0)
    assert [is_few(n) for n in (None, 1024, 8192, 8193)] == [None, True, True, None]


@pytest.mark.parametrize(("asked", "images", "applies"), [(None, 64, True), (False, 64, False), (True, 1200, True)])
def test_few_images_are_learned_from_as_such_with_labels_too(asked: bool | None, images: int, applies: bool) -> None:
    data, _ = counted_digits()
    assert learns_from_few(asked, limit_images(data, images, 0)) == applies
    many = dataclasses.replace(data, train=dataclasses.replace(data.train, indices=np.arange(FEW_IMAGES)))
    assert not learns_from_few(None, many)


def test_features_are_compared_relative_to_the_dense_ones() -> None:
    net = small_net()
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[3].weight[:, ::2] = 0
    matcher = FeatureMatcher(net, other, find_features(net, ["3.weight"], HOW))
    x = torch.randn(4, 1, 8, 8)
    kept: dict[nn.Module, torch.Tensor] = {}
    for network in (net, other):
        for index in (1, 4):
            network[index].register_forward_hook(lambda m, _, out: kept.update({m: out.clone()}))
    with torch.no_grad(), matcher.observing():
        net(x)
        other(x)
    found = float(matcher.loss())
    expected = []
    for index in (1, 4):
        dense, ours = kept[net[index]].numpy(), kept[other[index]].numpy()
        expected.append(((ours - dense) ** 2).mean() / dense.var())
    assert found == pytest.approx(np.mean(expected), rel=1e-4)
    assert expected[0] == 0
    # Nothing is left for the next batch.
    with torch.no_grad(), matcher.observing():
        net(x)
        net(x)
        other(x)
        other(x)
    assert float(matcher.loss()) == pytest.approx(found, rel=1e-4)
    # What an interrupted step left behind does not count either.
    with torch.no_grad():
        with matcher.observing():
            other(2 * x)
        with matcher.observing():
            net(x)
            other(x)
        assert float(matcher.loss()) == pytest.approx(found, rel=1e-4)


def test_without_batchnorm_the_masked_layers_are_compared() -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[2].weight.zero_()
        other[2].bias.zero_()
    matcher = FeatureMatcher(net, other, find_features(net, ["2.weight"], HOW))
    with torch.no_grad(), matcher.observing():
        x = torch.randn(2, 1, 8, 8)
        dense = net(x).numpy()
        other(x)
    assert float(matcher.loss()) == pytest.approx((dense**2).mean() / dense.var(), rel=1e-4)


class Traced(nn.BatchNorm2d):
    """Counts the outputs of all layers of this class that are in memory."""

    outputs: ClassVar[list[weakref.ref[torch.Tensor]]] = []
    most: ClassVar[int] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        Traced.outputs = [ref for ref in Traced.outputs if ref() is not None] + [weakref.ref(out)]
        Traced.most = max(Traced.most, len(Traced.outputs))
        return out


def test_no_features_of_evaluations_stay_in_memory() -> None:
    """They run over all images of `select`, and over those for the BatchNorm statistics, in copies of the networks too."""
    data, _ = counted_digits()
    net = small_net()
    net[1], net[4] = Traced(8).eval(), Traced(8).eval()
    masks = {"3.weight": magnitude_mask(net[3].weight.detach().numpy(), Pattern(2, 4))}
    options = LearnOptions(epochs=1, batch=8, match_features=1.0)
    learn_masks(net, masks, Pattern(2, 4), HOW, limit_images(data, 256, 0), options, device="cpu")
    # Two layers of the dense network and of the student, of this step and of the one before.
    assert 4 <= Traced.most <= 8


def test_evaluations_are_as_rare_as_asked_and_the_last_epoch_has_one(caplog: pytest.LogCaptureFixture) -> None:
    data, _ = counted_digits()
    net = small_net()
    masks = {"3.weight": magnitude_mask(net[3].weight.detach().numpy(), Pattern(2, 4))}
    with caplog.at_level("INFO", logger="maskplan"):
        learn_masks(
            net, masks, Pattern(2, 4), HOW, limit_images(data, 32, 0), LearnOptions(epochs=5, batch=8, judge_every=2)
        )
    assert [line for line in caplog.messages if line.startswith("epoch")] == [
        line for line in caplog.messages if line.startswith(("epoch 2/5", "epoch 4/5", "epoch 5/5"))
    ]
    assert sum(line.startswith("epoch") for line in caplog.messages) == 3


def test_the_command_learns_from_few_unlabeled_images(cli: Callable[..., Any], tmp_path: Path) -> None:
    """The record tells how many images were used; the masks are not the layer-wise ones that they start from."""
    folder = tmp_path / "images"
    folder.mkdir()
    digits = load_digits().train
    for number in range(60):
        pixels = np.asarray(Image.open(io.BytesIO(digits.images.read(int(digits.indices[number])))))
        Image.fromarray(pixels).save(folder / f"{number}.png")
    recipe = tmp_path / "r.toml"
    recipe.write_text("[learn]\nepochs = 2\n")
    files = {}
    for method in ("learned", "layerwise"):
        files[method] = tmp_path / f"{method}.safetensors"
        ran = cli(
            *("mask", "digits_resnet", "--data", folder, "--images", "32", "--method", method, "--recipe", recipe),
            *("-o", files[method], "--report", tmp_path / f"{method}.json"),
        )
        assert ran.code == 0, ran.err
        assert ("in the setting for few images" in ran.err) == (method == "learned")
    assert files["learned"].read_bytes() != files["layerwise"].read_bytes()
    assert '"images": 28' in (tmp_path / "learned.json").read_text()
