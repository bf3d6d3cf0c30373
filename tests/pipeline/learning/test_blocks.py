"""The phase that matches block by block: which blocks there are, what is compared, and that it resumes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from maskplan.pipeline.core.artifacts import Pattern, Preprocessing
from maskplan.pipeline.data.dataset import Dataset
from maskplan.pipeline.data.digits import PREPROCESSING, load_digits
from maskplan.pipeline.learning import learner
from maskplan.pipeline.learning.blocks import BlockMatcher, find_blocks
from maskplan.pipeline.learning.features import relative_difference
from maskplan.pipeline.learning.masked_net import Masks
from maskplan.pipeline.learning.options import LearnerFiles, LearnOptions
from maskplan.pipeline.learning.schedule import training_batches
from maskplan.pipeline.learning.trainer import learn_masks
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.masking.policy import select_layers
from maskplan.pipeline.models.batchnorm import RecalibrateOptions, update_statistics
from maskplan.pipeline.models.layers import trace_layers

TWO_FOUR = Pattern(2, 4)
COLOR = Preprocessing(3, 32, 32, 0, "bilinear", (0.5,) * 3, (0.25,) * 3)


def conv(channels_in: int, channels: int) -> nn.Module:
    return nn.Conv2d(channels_in, channels, 3, padding=1)


class Residual(nn.Module):
    """Two convolutions and a shortcut; changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = conv(8, 8), nn.BatchNorm2d(8)
        self.second = conv(8, 8)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        x = nn.functional.leaky_relu_(x, 0.5)
        return x + scale * self.second(torch.relu(self.bn(self.first(x))))


class Pair(nn.Module):
    """Takes a list and returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(8, 8), conv(8, 8)

    def forward(self, parts: list[torch.Tensor]) -> dict[str, Any]:
        return {"left": self.left(parts[0]), "right": self.right(parts[1]), "count": 2}


class Net(nn.Module):
    """Two residual blocks, of which one has a keyword argument, and a block with other kinds of inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(1, 8)
        self.one, self.two, self.pair = Residual(), Residual(), Pair()
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(self.one(self.stem(x)), scale=0.5)
        found = self.pair([x, 2 * x])
        return self.head((found["left"] + found["right"]).mean((2, 3)))


def masked_layers(net: nn.Module, preprocessing: Preprocessing) -> list[str]:
    return [layer.name for layer in select_layers(trace_layers(net, preprocessing)[0], TWO_FOUR).masked]


def blocks_of(net: nn.Module, preprocessing: Preprocessing = COLOR) -> list[str]:
    found = find_blocks(net.eval(), masked_layers(net, preprocessing), preprocessing)
    return [first if first == last else f"{first} to {last}" for first, last in found]


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    made = Net()
    update_statistics(made, load_digits().train, PREPROCESSING, RecalibrateOptions(images=128))
    return made.eval()


def test_residual_networks_are_divided_into_their_blocks() -> None:
    found = blocks_of(torchvision.models.resnet18(weights=None))
    assert found == [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]


def test_modules_with_branches_are_not_divided() -> None:
    net = torchvision.models.googlenet(weights=None, init_weights=False)
    found = blocks_of(net, dataclasses.replace(COLOR, height=64, width=64))
    # Two convolutions of the stem are called one by one; the auxiliary heads run in training only.
    assert found == [f"inception{name}" for name in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")]


def test_large_modules_are_divided() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(conv(8, 8), conv(8, 8)) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    found = blocks_of(nn.Sequential(conv(3, 8), Stage(), Stage()))
    assert found == [f"{s}.blocks.{b}.0 to {s}.blocks.{b}.1" for s in (1, 2) for b in range(4)]


def test_chains_end_at_poolings_and_after_three_masked_layers() -> None:
    chain = [conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), nn.MaxPool2d(2)]
    chain += [layer for _ in range(4) for layer in (conv(8, 8), nn.ReLU())]
    assert blocks_of(nn.Sequential(*chain)) == ["0 to 3", "5 to 10", "11 to 12"]


def test_layers_that_are_called_one_by_one_form_no_blocks() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(3, 8), conv(8, 8), conv(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(self.a(x)))

    assert blocks_of(Flat()) == []


def test_blocks_that_return_no_tensors_do_not_count() -> None:
    @dataclasses.dataclass
    class Found:
        values: torch.Tensor

    class Wrapped(Residual):
        def forward(self, x: torch.Tensor) -> Any:
            return Found(super().forward(x))

    class Opened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = conv(3, 8), Wrapped(), Residual()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(self.stem(x)).values)

    assert blocks_of(Opened()) == ["two"]


@pytest.mark.parametrize("value", [0.0, 3.0, 0.1, 1 / 3])
def test_where_the_dense_network_is_constant_nothing_is_compared(value: float) -> None:
    """The mean of so many equal numbers is another number."""
    ours = torch.randn(1000, 77, requires_grad=True)
    loss = relative_difference(ours, torch.full((1000, 77), value))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert ours.grad is not None
    assert float(ours.grad.abs().max()) == 0


@pytest.mark.parametrize("shapes", [((0, 3), (0, 3)), ((2, 3), (1, 3)), ((1, 3), (2, 3))])
def test_parts_that_other_images_reach_are_not_compared(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    ours, dense = (torch.randn(shape) for shape in shapes)
    assert relative_difference(ours, dense).item() == 0


def test_each_block_is_compared_on_the_inputs_of_the_dense_network(net: nn.Module) -> None:
    blocks = find_blocks(net, masked_layers(net, PREPROCESSING), PREPROCESSING)
    assert [first for first, _ in blocks] == ["one", "two", "pair"]
    student = copy.deepcopy(net)
    with torch.no_grad():
        for name in ("one.second", "two.first", "pair.left"):
            student.get_submodule(name).weight[:, ::2] = 0
    matcher = BlockMatcher(net, student, blocks)
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        plain = student(images)
        with matcher.observing():
            net(images)
            student(images)
        found = float(matcher.loss())
        at_one = net.stem(images)
        at_two = net.one(at_one.clone())
        at_pair = net.two(at_two.clone(), scale=0.5)
        outputs = [
            [
                network.one(at_one.clone()),
                network.two(at_two.clone(), scale=0.5),
                *(network.pair([at_pair, 2 * at_pair])[side] for side in ("left", "right")),
            ]
            for network in (net, student)
        ]
        assert torch.equal(student(images), plain)  # outside of `observing`, the network is as it was
    expected = [
        float(((ours - dense) ** 2).mean() / dense.var(correction=0)) for dense, ours in zip(*outputs, strict=True)
    ]
    assert min(expected[:3]) > 0
    assert expected[3] == 0
    assert found == pytest.approx(np.mean(expected), rel=1e-4)


def test_a_block_hears_nothing_of_the_blocks_behind_it(net: nn.Module) -> None:
    blocks = find_blocks(net, masked_layers(net, PREPROCESSING), PREPROCESSING)
    images = torch.randn(4, 1, 8, 8)

    def gradient(changed: str | None) -> torch.Tensor:
        student = copy.deepcopy(net)
        with torch.no_grad():
            student.one.first.weight[:, ::2] = 0
            if changed is not None:
                student.get_submodule(changed).weight.mul_(0.5)
        teacher = copy.deepcopy(net)
        matcher = BlockMatcher(teacher, student, blocks)
        with matcher.observing():
            with torch.no_grad():
                teacher(images)
            student(images)
        matcher.loss().backward()  # type: ignore[no-untyped-call]
        found = student.one.first.weight.grad
        assert found is not None
        return found

    assert float(gradient(None).abs().max()) > 0
    assert torch.equal(gradient("pair.left"), gradient(None))
    assert not torch.equal(gradient("one.second"), gradient(None))


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Some of the digits: five batches of training images."""
    whole = load_digits()
    train, select = (dataclasses.replace(s, indices=s.indices[:n]) for s, n in ((whole.train, 120), (whole.select, 40)))
    return dataclasses.replace(whole, train=train, select=select)


QUICK = LearnOptions(epochs=4, batch=24, match_features=1.0, match_blocks=0.5, augment="shift", save_every=2)


def learn(net: nn.Module, data: Dataset, files: LearnerFiles | None = None, **options: object) -> tuple[Masks, Any]:
    start = {n: magnitude_mask(net.state_dict()[n].numpy(), TWO_FOUR) for n in masked_layers(net, PREPROCESSING)}
    chosen = dataclasses.replace(QUICK, **options)  # type: ignore[arg-type]
    return learn_masks(net, start, TWO_FOUR, PREPROCESSING, data, chosen, files=files, device="cpu")


def test_both_phases_are_counted_and_logged(net: nn.Module, data: Dataset, tmp_path: Path) -> None:
    masks, learning = learn(net, data, LearnerFiles(log_dir=tmp_path))
    assert (learning.epochs, learning.steps) == (4, 20)
    assert learning.select_divergence_end < learning.select_divergence_start
    assert learning.groups_changed > 0
    rows = [(tmp_path / name).read_text().splitlines()[1:] for name in ("blocks/learning.csv", "learning.csv")]
    assert [[line.partition(",")[0] for line in part] for part in rows] == [["5", "10"], ["5", "10"]]
    without, _ = learn(net, data, match_blocks=0.0)
    assert any(not np.array_equal(masks[name], without[name]) for name in masks)


def test_a_network_without_blocks_has_one_phase(data: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(conv(1, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    _, learning = learn(net.append(nn.Linear(8, 10)).eval(), data, LearnerFiles(log_dir=tmp_path))
    assert (learning.epochs, learning.steps) == (4, 20)
    assert not (tmp_path / "blocks").exists()


@pytest.mark.parametrize("steps", [5, 9, 10, 11, 17])
def test_an_interrupted_run_ends_with_the_same_masks(
    steps: int, net: nn.Module, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first phase, between both, and in the second one."""
    files, left = LearnerFiles(tmp_path / "learning.safetensors"), [steps]

    def limited(*arguments: Any, **named: Any) -> Iterator[Any]:
        for batch in training_batches(*arguments, **named):
            if left[0] == 0:
                raise RuntimeError("interrupted")
            left[0] -= 1
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(learner, "training_batches", limited)
        with pytest.raises(RuntimeError, match="interrupted"):
            learn(net, data, files)
    taken: list[int] = []

    def counted(*arguments: Any, **named: Any) -> Iterator[Any]:
        for batch in training_batches(*arguments, **named):
            taken.append(1)
            yield batch

    monkeypatch.setattr(learner, "training_batches", counted)
    resumed, _ = learn(net, data, files)
    assert len(taken) == 20 - 2 * (steps // 2) if steps % 5 else len(taken) == 20 - steps
    whole, _ = learn(net, data)
    assert all(np.array_equal(resumed[name], whole[name]) for name in whole)
