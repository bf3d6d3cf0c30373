"""BatchNorm statistics relative to the dense network's: against NumPy, and networks whose right statistics are known."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from gray_images import PREPROCESSING, dataset, random_images
from torch import nn

from maskplan.pipeline.core.artifacts import Provenance
from maskplan.pipeline.data.dataset import Split
from maskplan.pipeline.models.batchnorm import RecalibrateOptions, dense_statistics, recalibrate, update_statistics
from maskplan.pipeline.models.dense_statistics import ChannelStatistics, DenseStatistics, batch_statistics

OPTIONS = RecalibrateOptions()


class Net(nn.Module):
    """Three convolutions with BatchNorm after each; the last BatchNorm has no weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(1, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(8, 8, (1, 3), bias=False), nn.BatchNorm2d(8)
        self.c, self.norm_c = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm_a(self.a(x)))
        x = torch.relu(self.norm_b(self.b(x)))
        return self.norm_c(self.c(x)).flatten(1)

    def norms(self) -> list[nn.BatchNorm2d]:
        return [self.norm_a, self.norm_b, self.norm_c]


def train(count: int, seed: int = 0) -> Split:
    return dataset(random_images(count + 4, seed=seed), count).train


def inputs(split: Split) -> torch.Tensor:
    pixels = split.images.pixels[split.indices]  # type: ignore[attr-defined]
    return ((torch.from_numpy(pixels).float() / 255 - 0.5) / 0.25).reshape(-1, 1, 2, 4)


@pytest.fixture
def net() -> Net:
    """Its statistics come from 400 images."""
    torch.manual_seed(0)
    made = Net()
    for norm in made.norms()[:2]:
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    update_statistics(made, train(400), PREPROCESSING, RecalibrateOptions(batch=400))
    return made


def pruned(module: Net) -> Net:
    """Half of the weights of two convolutions are zero."""
    sparse = copy.deepcopy(module)
    with torch.no_grad():
        sparse.b.weight[:, ::2] = 0
        sparse.c.weight[:, 2:6] = 0
    return sparse


def relative(module: Net, dense: Net, split: Split) -> Net:
    changed = copy.deepcopy(module)
    update_statistics(changed, split, PREPROCESSING, OPTIONS, dense_statistics(dense, split, PREPROCESSING, OPTIONS))
    return changed


def plain(module: Net, split: Split) -> Net:
    changed = copy.deepcopy(module)
    update_statistics(changed, split, PREPROCESSING, OPTIONS)
    return changed


def numbers(module: Net) -> np.ndarray:
    return np.concatenate([t.numpy() for n in module.norms() for t in (n.running_mean, n.running_var)])  # type: ignore[union-attr]


@pytest.mark.parametrize("count", [2, 5, 300])
def test_the_dense_network_keeps_its_statistics_whatever_the_images(net: Net, count: int) -> None:
    assert np.array_equal(numbers(relative(net, net, train(count, seed=3))), numbers(net))
    assert numbers(plain(net, train(count, seed=3))) != pytest.approx(numbers(net), rel=1e-2)


def test_a_network_with_larger_weights_gets_statistics_under_which_it_computes_the_same(net: Net) -> None:
    """Three times the weights: the right mean is three times, the right variance nine times the old one."""
    larger, few = copy.deepcopy(net), train(8, seed=3)
    with torch.no_grad():
        for conv in (larger.a, larger.b, larger.c):
            for parameter in conv.parameters():
                parameter.mul_(3)
    x = inputs(train(50, seed=4))
    with torch.no_grad():
        wanted = net(x)
        assert relative(larger, net, few)(x).numpy() == pytest.approx(wanted.numpy(), abs=0.2)
        assert plain(larger, few)(x).numpy() != pytest.approx(wanted.numpy(), abs=0.5)


def test_few_images_give_statistics_nearer_to_those_of_many(net: Net) -> None:
    """The right statistics are those of the 400 images that the dense network's come from."""
    sparse = pruned(net)
    right = copy.deepcopy(sparse)
    update_statistics(right, train(400), PREPROCESSING, RecalibrateOptions(batch=400))
    errors = [
        [np.abs(numbers(found) - numbers(right)).sum() for found in (relative(sparse, net, few), plain(sparse, few))]
        for few in (train(12, seed=seed) for seed in range(5, 15))
    ]
    ours, theirs = np.mean(errors, axis=0)
    assert ours < 0.6 * theirs


def test_the_correction_equals_numpys() -> None:
    rng = np.random.default_rng(0)
    stored, dense, masked = (
        ChannelStatistics(*(torch.from_numpy(rng.uniform(0.5, 2, 6)) for _ in range(2))) for _ in range(3)
    )
    found = DenseStatistics({"n": stored}, {"n": [dense]}).correct("n", masked)
    share = 1e-3 * stored.variance.numpy()
    quotient = (masked.variance.numpy() + share) / (dense.variance.numpy() + share)
    assert found.variance.numpy() == pytest.approx(stored.variance.numpy() * quotient, rel=1e-12)
    wanted = masked.mean.numpy() + (stored.mean.numpy() - dense.mean.numpy()) * np.sqrt(quotient)
    assert found.mean.numpy() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("stored", "dense", "masked", "wanted"),
    [
        # Constant in the dense network: only the images at hand say anything.
        ((0.0, 0.0), (0.0, 0.0), (0.5, 2.0), (0.5, 2.0)),
        # Constant on these images, in both networks: the stored variance stays.
        ((0.3, 2.0), (0.1, 0.0), (0.1, 0.0), (0.3, 2.0)),
    ],
)
def test_channels_without_variance(
    stored: tuple[float, float], dense: tuple[float, float], masked: tuple[float, float], wanted: tuple[float, float]
) -> None:
    given = [ChannelStatistics(*(torch.tensor([v]) for v in pair)) for pair in (stored, dense, masked)]
    found = DenseStatistics({"n": given[0]}, {"n": [given[1]]}).correct("n", given[2])
    assert (float(found.mean), float(found.variance)) == pytest.approx(wanted)


@pytest.mark.parametrize("is_relative", [True, False])
def test_the_stage_writes_corrected_statistics(is_relative: bool, net: Net, tmp_path: Path) -> None:
    few, sparse = train(12, seed=3), pruned(net)
    about = Provenance("net", True, "w.pth", "", 3, (), PREPROCESSING)
    options = RecalibrateOptions(relative=is_relative)
    recalibrate(sparse, about, few, options, tmp_path / "out.safetensors", (), net)
    wanted = relative(pruned(net), net, few) if is_relative else plain(pruned(net), few)
    assert np.array_equal(numbers(sparse), numbers(wanted))


def test_without_the_option_the_statistics_are_those_of_the_images(net: Net) -> None:
    assert dense_statistics(net, train(8), PREPROCESSING, RecalibrateOptions(relative=False)) is None


def test_a_layer_whose_statistics_were_taken_away_stays_without(net: Net) -> None:
    net.norm_b.running_mean = net.norm_b.running_var = None
    found, wanted = relative(net, net, train(8, seed=3)), plain(net, train(8, seed=3))
    for module in (found, wanted):
        assert module.norm_b.running_mean is None
        assert module.norm_b.running_var is None
    assert found.norm_a.running_mean is not None
    assert torch.equal(found.norm_a.running_mean, net.norm_a.running_mean)  # type: ignore[arg-type]


def test_the_dense_network_does_not_change(net: Net) -> None:
    before = copy.deepcopy(net.state_dict())
    dense_statistics(net, train(8, seed=3), PREPROCESSING, OPTIONS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not net.training


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (4, 3, 2, 5), (2, 3, 2, 2, 2), (600_000, 2)])
def test_statistics_of_a_batch(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 100
    axes = tuple(i for i in range(len(shape)) if i != 1)
    for biased in (True, False):
        found = batch_statistics((), {"input": x}, biased=biased)
        assert found is not None
        wanted = x.double().numpy()
        assert found.mean.numpy() == pytest.approx(wanted.mean(axes), rel=1e-6)
        assert found.variance.numpy() == pytest.approx(wanted.var(axes, ddof=0 if biased else 1), rel=1e-4)


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (0, 3, 4, 4), (1, 3, 1, 1), (4, 0)])
def test_fewer_than_two_values_have_no_statistics(shape: tuple[int, ...]) -> None:
    assert batch_statistics((torch.ones(shape),), {}) is None


def test_statistics_are_float32_whatever_the_default() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        found = batch_statistics((torch.ones((4, 2), dtype=torch.float32),), {})
    finally:
        torch.set_default_dtype(torch.float32)
    assert found is not None
    assert found.variance.dtype == torch.float32


@pytest.mark.parametrize("batch", [0, 1, 2, None])
def test_calls_that_the_dense_network_does_not_make_have_their_own_statistics(batch: int | None) -> None:
    stored, estimate = (ChannelStatistics(torch.full((2,), v), torch.full((2,), v)) for v in (1.0, 5.0))
    reference = DenseStatistics({"n": stored, "m": stored}, {"n": [None]})
    assert reference.correct("n", estimate, batch) is estimate
    assert reference.correct("m", estimate, batch) is estimate


class Routed(nn.Module):
    """Only some images reach the second BatchNorm: those whose first features are large."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.all, self.norm, self.some = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.all(x))
        chosen = x.amax((1, 2, 3)) > self.threshold
        out = x.clone()
        out[chosen] = self.some(input=x[chosen])
        return out.flatten(1)


@pytest.mark.parametrize("thresholds", [(1.5, 0.0), (0.0, 1.5), (99.0, 0.0), (0.0, 99.0), (99.0, 99.0)])
def test_parts_that_other_images_reach_in_the_pruned_network(thresholds: tuple[float, float]) -> None:
    torch.manual_seed(0)
    dense = Routed(thresholds[0])
    sparse = copy.deepcopy(dense)
    sparse.threshold = thresholds[1]
    few, options = train(40), RecalibrateOptions(batch=4)
    update_statistics(sparse, few, PREPROCESSING, options, dense_statistics(dense, few, PREPROCESSING, options))
    assert all(bool(tensor.isfinite().all()) for tensor in sparse.state_dict().values())
    if thresholds == (99.0, 0.0):
        # The dense network says nothing of that layer: its statistics are those of the images.
        assert float(sparse.some.running_mean.abs().max()) > 0.1  # type: ignore[union-attr]
    if thresholds[1] == 99.0:
        assert bool((sparse.some.running_mean == 0).all())
