"""BatchNorm statistics, against NumPy on the same images."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from maskplan.pipeline.core.artifacts import ImageSet, Preprocessing, Provenance
from maskplan.pipeline.data.dataset import Split
from maskplan.pipeline.models.batchnorm import RecalibrateOptions, recalibrate, update_statistics
from maskplan.pipeline.models.checkpoint import read_checkpoint

HOW = Preprocessing(3, 3, 5, 0, "bilinear", (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
PROVENANCE = Provenance("net", True, "w.pth", "ab" * 32, 4, (), HOW, masked=("conv.weight",), pattern="2:4")
TRAIN = ImageSet("train", 20, "cd" * 32, ("0" * 16,))


@dataclasses.dataclass(frozen=True)
class InMemory:
    """Color images of 3x5, no two alike, that were never files."""

    pixels: npt.NDArray[np.uint8]

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return np.zeros(len(self.pixels), np.int64)

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self.pixels[index]).save(buffer, "PPM")
        return buffer.getvalue()


def images(count: int) -> InMemory:
    """Each darker than the next, so that it matters which ones are shown."""
    rng = np.random.default_rng(0)
    return InMemory(np.stack([rng.integers(0, 50 + 200 * i // count, (3, 5, 3), np.uint8) for i in range(count)]))


def split(count: int) -> Split:
    return Split("train", images(count), np.arange(count))


class Net(nn.Module):
    """BatchNorm on the images themselves and after a convolution; dropout before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3, affine=False, momentum=0.3)
        self.conv = nn.Conv2d(3, 4, 1)
        self.drop = nn.Dropout(0.5)
        self.second = nn.BatchNorm2d(4, momentum=None)
        self.fixed = nn.BatchNorm2d(4, track_running_stats=False)
        self.shown: list[npt.NDArray[np.float32]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shown.append(x.numpy().copy())
        x = self.second(self.drop(self.conv(self.first(x))))
        return self.fixed(x).mean((2, 3))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    made = Net()
    for norm in (made.first, made.second):
        nn.init.uniform_(norm.running_mean, -5, 5)
        nn.init.uniform_(norm.running_var, 5, 9)
        norm.num_batches_tracked.fill_(77)
    return made


def moments(x: npt.NDArray[np.floating]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """A batch's mean and unbiased variance, a number a channel."""
    x = x.astype(np.float64)
    return x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3), ddof=1)


def average(found: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    return np.mean([m for m, _ in found], axis=0), np.mean([v for _, v in found], axis=0)


def statistics(norm: nn.BatchNorm2d) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.numpy(), norm.running_var.numpy()


def numbers(net: Net, source: InMemory) -> list[int]:
    """Which images were shown, in order."""
    x = source.pixels.transpose(0, 3, 1, 2) / 255
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (HOW.mean, HOW.std))
    wanted = (x - mean) / std
    return [int(np.abs(wanted - one).max(axis=(1, 2, 3)).argmin()) for one in np.concatenate(net.shown)]


def test_images_are_augmented_on_request(net: Net) -> None:
    """The images are 3x5, so that nothing moves; half of them are mirrored, and statistics are of what was shown."""
    update_statistics(net, split(20), HOW, RecalibrateOptions(augment="crop+flip"))
    plain = Net()
    update_statistics(plain, split(20), HOW, RecalibrateOptions())
    (x,), (y,) = net.shown, plain.shown
    same = (x == y).all(axis=(1, 2, 3))
    mirrored = (x == y[:, :, :, ::-1]).all(axis=(1, 2, 3))
    assert (same | mirrored).all()
    assert 0 < same.sum() < 20
    mean, _ = average([moments(x)])
    assert statistics(net.first)[0] == pytest.approx(mean, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("count", "asked", "batch", "sizes"),
    [
        (20, 10_000, 128, [20]),
        (20, 20, 20, [20]),
        (20, 20, 5, [5, 5, 5, 5]),
        (20, 20, 6, [6, 6, 6]),
        (20, 13, 5, [5, 5]),
        (20, 4, 5, [4]),
        (21, 10_000, 20, [20]),
    ],
)
def test_the_statistics_are_the_mean_over_full_batches(
    net: Net, count: int, asked: int, batch: int, sizes: list[int]
) -> None:
    source = split(count)
    used = update_statistics(net, source, HOW, RecalibrateOptions(images=asked, batch=batch))
    assert [len(x) for x in net.shown] == sizes
    assert used == sum(sizes)
    mean, var = average([moments(x) for x in net.shown])
    assert statistics(net.first)[0] == pytest.approx(mean, rel=1e-4, abs=1e-5)
    assert statistics(net.first)[1] == pytest.approx(var, rel=1e-4)

    weight, bias = net.conv.weight.detach().double().numpy()[:, :, 0, 0], net.conv.bias.detach().double().numpy()
    inner = []
    for x in net.shown:
        one = x.astype(np.float64)
        centered = one - one.mean(axis=(0, 2, 3), keepdims=True)
        normal = centered / np.sqrt(one.var(axis=(0, 2, 3), keepdims=True) + 1e-5)
        inner.append(moments(np.einsum("kc,nchw->nkhw", weight, normal) + bias[:, None, None]))
    mean, var = average(inner)
    assert statistics(net.second)[0] == pytest.approx(mean, rel=1e-3, abs=1e-5)
    assert statistics(net.second)[1] == pytest.approx(var, rel=1e-3)


def test_every_image_is_shown_once_in_an_order_of_the_seed(net: Net) -> None:
    source = images(20)
    orders = []
    for seed in (0, 0, 1):
        net.shown.clear()
        update_statistics(net, Split("train", source, np.arange(20)), HOW, RecalibrateOptions(batch=5, seed=seed))
        orders.append(numbers(net, source))
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_only_the_split_is_shown_and_fewer_images_are_drawn_from_all_of_it(net: Net) -> None:
    source, part = images(40), np.arange(1, 40, 2)
    shown: set[int] = set()
    for seed in range(8):
        net.shown.clear()
        assert update_statistics(net, Split("train", source, part), HOW, RecalibrateOptions(8, 4, seed)) == 8
        found = numbers(net, source)
        assert len(set(found)) == 8
        shown |= set(found)
    assert shown <= set(part.tolist())
    assert max(shown) > 30
    assert min(shown) < 10


def test_only_the_statistics_change(net: Net) -> None:
    before = copy.deepcopy(net.state_dict())
    options = RecalibrateOptions(batch=5)
    update_statistics(net.train(), split(20), HOW, options)
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{norm}.{kind}" for norm in ("first", "second") for kind in kinds}
    assert (net.first.momentum, net.second.momentum) == (0.3, None)
    assert not any(m.training for m in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_old_statistics_do_not_matter(net: Net) -> None:
    other = copy.deepcopy(net)
    for norm in (other.first, other.second):
        norm.reset_running_stats()
    for module in (net, other):
        update_statistics(module, split(20), HOW, RecalibrateOptions(batch=5))
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), other.buffers(), strict=True))


def without_norms() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.Flatten())


@pytest.mark.parametrize(
    ("make", "count", "asked"), [(without_norms, 20, 10_000), (Net, 20, 0), (Net, 20, 1), (Net, 1, 10_000), (Net, 0, 9)]
)
def test_without_norms_or_images_nothing_changes(make: Callable[[], nn.Module], count: int, asked: int) -> None:
    module = make()
    before = copy.deepcopy(module.state_dict())
    source = Split("train", images(20), np.arange(count))
    assert update_statistics(module, source, HOW, RecalibrateOptions(images=asked)) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_batchnorm_that_no_image_reaches_keeps_its_statistics() -> None:
    """As in the auxiliary heads of Inception and GoogLeNet, which run in training only."""

    class WithAuxiliary(Net):
        def __init__(self) -> None:
            super().__init__()
            self.auxiliary = nn.BatchNorm2d(4)
            nn.init.uniform_(self.auxiliary.running_mean, 1, 2)

    module = WithAuxiliary()
    before = copy.deepcopy(module.auxiliary.state_dict())
    assert update_statistics(module, split(20), HOW, RecalibrateOptions()) == 20
    assert statistics(module.second)[0].any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.auxiliary.state_dict().items())


def test_a_failure_restores_momentum_and_mode(net: Net, tmp_path: Path) -> None:
    source = images(20)
    broken = Split("train", InMemory(source.pixels[:12]), np.arange(20))
    with pytest.raises(IndexError):
        recalibrate(net, PROVENANCE, broken, RecalibrateOptions(batch=2), tmp_path / "out.safetensors")
    assert (net.first.momentum, net.second.momentum) == (0.3, None)
    assert not any(m.training for m in net.modules())
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_contains_the_new_statistics_and_records_them(net: Net, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out.safetensors"
    written = recalibrate(net, PROVENANCE, split(20), RecalibrateOptions(batch=6), out, (TRAIN,))
    assert written.provenance == dataclasses.replace(PROVENANCE, recalibrated_images=18, image_sets=(TRAIN,))
    assert written == read_checkpoint(out)
    assert written.sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    state = safetensors.torch.load_file(out)
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    assert state["second.num_batches_tracked"] == 3


def test_image_sets_are_added_once_and_only_if_images_were_used(net: Net, tmp_path: Path) -> None:
    select = dataclasses.replace(TRAIN, role="select", sha256="ef" * 32)
    known = dataclasses.replace(PROVENANCE, image_sets=(TRAIN,))
    out = tmp_path / "out.safetensors"
    used = recalibrate(net, known, split(20), RecalibrateOptions(), out, (TRAIN, select))
    assert used.provenance.image_sets == (TRAIN, select)
    idle = recalibrate(without_norms(), known, split(20), RecalibrateOptions(), out, (TRAIN, select))
    assert idle.provenance.image_sets == (TRAIN,)
    assert idle.provenance.recalibrated_images == 0


def test_the_same_images_give_the_same_bytes(net: Net, tmp_path: Path) -> None:
    other = copy.deepcopy(net)
    torch.manual_seed(5)
    first = recalibrate(net, PROVENANCE, split(20), RecalibrateOptions(batch=6), tmp_path / "a", (TRAIN,))
    torch.manual_seed(6)
    second = recalibrate(other, PROVENANCE, split(20), RecalibrateOptions(batch=6), tmp_path / "b", (TRAIN,))
    assert first.sha256 == second.sha256
