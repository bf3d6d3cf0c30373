"""Learning with networks whose forward pass needs an order in memory, changes its input, or computes without gradients."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from maskplan.pipeline.core.artifacts import Pattern, Provenance
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import Dataset
from maskplan.pipeline.data.digits import CLASSES, PREPROCESSING, load_digits
from maskplan.pipeline.data.few_images import limit_images
from maskplan.pipeline.learning.features import find_features
from maskplan.pipeline.learning.masked_net import Masks
from maskplan.pipeline.learning.memory_format import in_format, use_fastest_format
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.learning.trainer import learn_masks
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.models.factory_modules import prepare_module
from maskplan.pipeline.models.state_dict import tensors_sha256
from maskplan.pipeline.pruning.mask import MaskOptions, choose_masks

TWO_FOUR = Pattern(2, 4)
QUICK = LearnOptions(epochs=5, batch=16, lr=0.5, init_std=0.5, init_margin=0.5, noise_start=0.0)
FEW = dataclasses.replace(QUICK, match_features=1.0, match_blocks=0.4, augment="shift+flip")


class Net(nn.Module):
    """Two convolutions in a block, and a head; subclasses change how they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.last, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(torch.relu(self.stem(self.normalize(x))))
        return self.head(self.last(torch.relu(x)).mean((2, 3)))

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * x + 1


class ChangesItsInput(Net):
    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(3).add_(1)


class Viewed(Net):
    """A view of a feature map, as in classifiers with a flattening of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8 * 8 * 8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.last(torch.relu(self.block(torch.relu(self.stem(x)))))
        return self.head(x.view(len(x), -1))


class ViewedAfterPooling(Viewed):
    """The first convolution of one channel decides the order of all features, and counts as contiguous in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8 * 2 * 2, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.max_pool2d(torch.relu(self.stem(x)), 2)
        x = torch.max_pool2d(torch.relu(self.last(torch.relu(self.block(x)))), 2)
        return self.head(x.view(x.size(0), -1))


class UsesWeights(Net):
    """Calls none of its convolutions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.stem, self.block[0], self.block[2], self.last):
            x = torch.relu(nn.functional.conv2d(x, layer.weight, layer.bias, padding=1))
        return self.head(x.mean((2, 3)))


class UsesStatistics(Net):
    """Reads the tensors of a BatchNorm layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.block(torch.relu(self.stem(x))))
        x = nn.functional.batch_norm(self.last(x), self.norm.running_mean, self.norm.running_var)
        return self.head(x.mean((2, 3)))


class Counts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


class FrozenBlock(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.block(torch.relu(self.stem(x)))
        return self.head(self.last(torch.relu(x)).mean((2, 3)))


class Frozen(Net):
    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Checkpointed(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.block, torch.relu(self.stem(x)), use_reentrant=False)
        return self.head(self.last(torch.relu(x)).mean((2, 3)))


class Selects(Net):
    """No image of a batch may reach one of its layers, which has statistics nevertheless."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.some = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.block(torch.relu(self.stem(x))))
        self.some.eval()(x[:0])
        return self.head(self.last(torch.relu(x)).mean((2, 3)))


class CompiledWhole(Net):
    """A method that is compiled in one piece, with BatchNorm in it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    @torch.compile(backend="eager", fullgraph=True)
    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.normalized(self.block(torch.relu(self.stem(x))))
        return self.head(self.last(x).mean((2, 3)))


class CheckpointedTwice(Net):
    """BatchNorm that is called twice, in a part that is computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(torch.relu(self.stem(x)))
        x = checkpoint(lambda y: self.norm(torch.relu(self.norm(y))), x, use_reentrant=False)
        return self.head(self.last(x).mean((2, 3)))


class Infinite(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x).clone()
        logits[:, 3] = -torch.inf
        return logits


class Equalized(nn.Conv2d):
    """Its outputs are not its weight times its inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(x)


@pytest.fixture
def data() -> Dataset:
    return limit_images(load_digits(), 64, 0)


def net_of(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = kind()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= 2
    return net.eval()


def start_of(net: nn.Module) -> Masks:
    """The smallest weights, so that there is something to gain."""
    names = ("block.0.weight", "block.2.weight", "last.weight")
    return {name: ~magnitude_mask(net.get_parameter(name).detach().numpy(), TWO_FOUR) for name in names}


def learn(net: nn.Module, data: Dataset, options: LearnOptions = FEW) -> tuple[Masks, Any]:
    return learn_masks(net, start_of(net), TWO_FOUR, PREPROCESSING, data, options, favor_start=True, device="cpu")


@pytest.mark.parametrize(
    "kind", [Viewed, ViewedAfterPooling, UsesWeights, UsesStatistics, Counts, FrozenBlock, Selects, CompiledWhole]
)
@pytest.mark.parametrize("options", [FEW, QUICK], ids=["few", "many"])
def test_masks_are_learned(kind: type[nn.Module], options: LearnOptions, data: Dataset) -> None:
    net = net_of(kind)
    before = tensors_sha256(net.state_dict())
    masks, learning = learn(net, data, options)
    assert learning.groups_changed > 0
    assert all((mask.reshape(8, 2, 4, 9).sum(2) == 2).all() for mask in masks.values())
    assert tensors_sha256(net.state_dict()) == before


@pytest.mark.parametrize(
    ("kind", "names"),
    [(UsesStatistics, ("block.0", "block.2", "last")), (UsesWeights, ())],
)
def test_features_are_those_of_modules_that_are_called(kind: type[nn.Module], names: tuple[str, ...]) -> None:
    net = net_of(kind)
    assert find_features(net, list(start_of(net)), PREPROCESSING) == names


def test_images_that_a_network_changes_reach_the_other_network_as_they_were(data: Dataset) -> None:
    (masks, learning), (expected, reference) = (learn(net_of(kind), data) for kind in (ChangesItsInput, Net))
    assert all(np.array_equal(masks[name], expected[name]) for name in expected)
    for score in ("select_divergence_start", "select_divergence_end"):
        assert getattr(learning, score) == pytest.approx(getattr(reference, score), rel=1e-4)


def test_the_order_in_memory_is_the_fast_one_unless_the_network_refuses_it() -> None:
    net, viewed = net_of(Net), net_of(Viewed)
    assert use_fastest_format(net, PREPROCESSING) == torch.channels_last
    assert use_fastest_format(viewed, PREPROCESSING) == torch.contiguous_format
    for module, order in ((net, torch.channels_last), (viewed, torch.contiguous_format)):
        assert module.get_parameter("block.0.weight").is_contiguous(memory_format=order)


def test_the_strides_of_images_of_one_channel_are_those_of_their_order() -> None:
    images = torch.rand(2, 8, 8, 1).permute(0, 3, 1, 2)
    assert in_format(images, torch.contiguous_format).stride() == (64, 64, 8, 1)
    assert in_format(images, torch.channels_last).stride() == (64, 1, 8, 1)
    assert torch.equal(in_format(images, torch.contiguous_format), images)


@pytest.mark.parametrize(
    ("kind", "what", "fix"),
    [
        (Frozen, "computes without gradients", "remove torch.no_grad()"),
        (Checkpointed, "fails in the model's forward or backward pass", "remove activation checkpointing"),
        (CheckpointedTwice, "fails in the model's forward or backward pass", "remove activation checkpointing"),
        (Infinite, "the dense model's outputs are not finite", "before infinite values are put in"),
    ],
)
def test_what_cannot_be_learned_is_said(kind: type[nn.Module], what: str, fix: str, data: Dataset) -> None:
    with pytest.raises(InputError) as caught:
        learn(net_of(kind), data)
    assert what in caught.value.what
    assert fix in (caught.value.fix or "")


@pytest.mark.parametrize("match_blocks", [0.0, 0.5])
def test_masks_of_a_run_whose_time_is_up_are_scored(
    match_blocks: float, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the next evaluation is far away, and the schedule has just ended."""
    clock = iter(range(10**6))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    options = dataclasses.replace(FEW, epochs=1000, judge_every=1000, budget_minutes=2, match_blocks=match_blocks)
    _, learning = learn(net_of(Net), data, options)
    assert 0 < learning.epochs < 100
    assert learning.groups_changed > 0
    assert learning.select_divergence_end < learning.select_divergence_start


def test_blocks_take_all_epochs_but_one_at_most(data: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="maskplan"):
        learn(net_of(Net), data, LearnOptions(epochs=2, batch=16, match_blocks=1.0))
    assert [line for line in caplog.messages if line.startswith("epoch")] == [
        line for line in caplog.messages if line.startswith("epoch 1/1")
    ]
    assert any(line.startswith("learning masks, each block by itself") for line in caplog.messages)


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), None], ids=["wrapped", "in place"])
def test_features_inside_of_a_compiled_part_are_compared(
    wrap: Callable[[nn.Module], Any] | None, data: Dataset
) -> None:
    net = net_of(Net)
    if wrap is not None:
        net.block = wrap(net.block)
    else:
        net.block.compile(backend="eager")
    net = prepare_module(net, PREPROCESSING, "net")
    assert type(net.block) is nn.Sequential
    masks, _ = learn(net, data)
    expected, _ = learn(net_of(Net), data)
    assert all(np.array_equal(masks[name], expected[name]) for name in expected)


def test_layers_of_other_arithmetic_alone_start_from_magnitude_masks(
    data: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = net_of(Net)
    net.last = Equalized(8, 8, 3, padding=1)
    about = Provenance("net", True, "w.pth", "", 10, CLASSES, PREPROCESSING)
    learn = LearnOptions(epochs=1, batch=16)
    with caplog.at_level(logging.INFO, logger="maskplan"):
        choose_masks(net.eval(), about, MaskOptions("learned", learn=learn), tmp_path / "m.safetensors", data)
    assert "1 layers start from magnitude masks: last.weight" in caplog.messages


def test_a_budget_of_dense_layers_that_leaves_none_to_mask_is_an_error(data: Dataset, tmp_path: Path) -> None:
    about = Provenance("net", True, "w.pth", "", 10, CLASSES, PREPROCESSING)
    options = MaskOptions("learned", keep_dense_budget=100.0, learn=LearnOptions(epochs=1, batch=16))
    with pytest.raises(InputError, match="no layer is left to mask"):
        choose_masks(net_of(Net), about, options, tmp_path / "m.safetensors", data)
