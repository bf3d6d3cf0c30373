"""Learning with weights of zeros, tensors of five axes, several names of one layer, and few images."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
import torch
from gray_images import PREPROCESSING, dataset, random_images
from torch import nn

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.learning.masked_net import MaskedNet
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.learning.trainer import Masks, learn_masks

TWO_FOUR = Pattern(2, 4)


class Ran(Protocol):
    code: int
    out: str
    err: str


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(1, 1, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(torch.relu(self.stem(x))).mean((2, 3))) * self.scale.reshape(())


def every_second(*names: str) -> Masks:
    mask = np.zeros((8, 8, 1, 1), dtype=bool)
    mask[:, ::2] = True
    return dict.fromkeys(names, mask)


def learn(net: nn.Module, start: Masks, **options: float) -> Masks:
    images = dataset(random_images(32), 24)
    masks, _ = learn_masks(net, start, TWO_FOUR, PREPROCESSING, images, LearnOptions(epochs=1, batch=8, **options))
    return masks


def test_a_weight_of_zeros_keeps_nothing_of_its_magnitude() -> None:
    net = Net().eval()
    nn.init.zeros_(net.conv.weight)
    masked = MaskedNet(net, ["conv.weight"], TWO_FOUR, 0.1, hard=True)
    _, kept = masked(torch.rand(2, 1, 1, 4), 1.0, 1.0, [0])
    assert float(kept.detach()) == 0.0
    kept.backward()
    assert all(bool(p.grad.isfinite().all()) for p in masked.logits() if p.grad is not None)


def test_masks_of_a_weight_of_zeros_are_learned_with_a_reward_for_magnitude() -> None:
    net = Net().eval()
    nn.init.zeros_(net.conv.weight)
    masks = learn(net, every_second("conv.weight"), norm_reward=0.5)
    assert masks["conv.weight"].sum() == 32


def test_a_network_with_a_parameter_of_five_axes_learns() -> None:
    assert learn(Net().eval(), every_second("conv.weight"))["conv.weight"].sum() == 32


def test_a_layer_with_two_names_of_a_shared_weight_learns_one_mask() -> None:
    """PyTorch refuses values for two of the three names of a weight."""
    net = Net()
    net.second = nn.Conv2d(8, 8, 1)
    net.second.weight = net.conv.weight
    net.alias = net.second
    masks = learn(net.eval(), every_second("conv.weight", "second.weight"))
    assert np.array_equal(masks["conv.weight"], masks["second.weight"])


@pytest.fixture
def one_image_a_class(toy_data: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "few"
    shutil.copytree(toy_data / "val", folder / "val")
    for source in sorted((toy_data / "train").iterdir()):
        (folder / "train" / source.name).mkdir(parents=True)
        shutil.copy(min(source.iterdir()), folder / "train" / source.name)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ("mask", "--method", "learned"),
        ("mask", "--method", "magnitude", "--keep-dense-budget", "10"),
        ("convert",),
    ],
    ids=["learned", "budget", "convert"],
)
def test_one_image_a_class_is_too_few_with_the_number_needed(
    cli: Callable[..., Ran], tiny_spec: str, one_image_a_class: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    name, *options = command
    out = tmp_path / "o.safetensors"
    ran = cli(name, tiny_spec, "--weights", "random", *options, "--data", one_image_a_class, "-o", out)
    assert ran.code == 3, ran
    assert "at least 2 training images of a class" in ran.err
    assert not out.exists()


def test_one_image_a_class_is_enough_for_layerwise_masks(
    cli: Callable[..., Ran], tiny_spec: str, one_image_a_class: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.safetensors"
    options = ("--method", "layerwise", "--data", one_image_a_class, "-o", out)
    assert cli("mask", tiny_spec, "--weights", "random", *options).code == 0
