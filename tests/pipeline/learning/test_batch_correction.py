"""BatchNorm of the masked network, corrected by the dense network's statistics of the same batch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from maskplan.pipeline.learning.batch_correction import BatchCorrection
from maskplan.pipeline.models.dense_statistics import named_batchnorms


class Scaled(nn.BatchNorm2d):
    """A BatchNorm layer that does more than normalize, as those of timm do."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(input))


class Net(nn.Module):
    """Convolutions with BatchNorm of several kinds; one layer is called twice, one keeps no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), Scaled(8, eps=0.1)
        self.second, self.plain = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)
        self.own = nn.BatchNorm2d(8, track_running_stats=False)
        self.last, self.vectors = nn.Linear(8, 4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(input=self.first(x))
        x = torch.relu(self.plain(self.second(x)))
        x = self.plain(self.second(x)) + self.own(x)
        return self.vectors(self.last(x.mean((2, 3))))


@pytest.fixture
def dense() -> Net:
    """Its statistics are not those of the images."""
    torch.manual_seed(0)
    net = Net()
    for layer in named_batchnorms(net).values():
        nn.init.uniform_(layer.running_mean, -1, 1)  # type: ignore[arg-type]
        nn.init.uniform_(layer.running_var, 0.1, 3)  # type: ignore[arg-type]
        if layer.affine:
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.uniform_(layer.bias)
    return net.eval().requires_grad_(False)


def corrected(dense: Net, sparse: Net | None = None) -> tuple[Net, BatchCorrection]:
    """A copy that normalizes by its batches, and its correction."""
    student = copy.deepcopy(sparse or dense)
    for layer in named_batchnorms(student).values():
        layer.train()
    return student, BatchCorrection(dense, student)


def images(count: int, seed: int) -> torch.Tensor:
    return torch.randn((count, 3, 6, 6), generator=torch.Generator().manual_seed(seed)) * (1 + seed)


def pruned(dense: Net) -> Net:
    """With a few percent of the weights of two layers removed."""
    sparse = copy.deepcopy(dense)
    for layer in (sparse.first, sparse.second):
        layer.weight[layer.weight.abs() < 0.01] = 0
    return sparse


def test_without_masks_each_batch_gives_what_the_dense_network_gives(dense: Net) -> None:
    student, correction = corrected(dense)
    for seed, count in enumerate((4, 16, 2)):
        x = images(count, seed)
        with correction.observing():
            wanted, found = dense(x), student(x)
        assert found.numpy() == pytest.approx(wanted.numpy(), abs=2e-4)


def test_a_masked_layer_against_numpy() -> None:
    rng = np.random.default_rng(0)
    dense = nn.Sequential(nn.BatchNorm1d(3, eps=0.01)).eval().requires_grad_(False)
    layer = dense[0]
    stored = rng.uniform(0.5, 2, (4, 3)).astype(np.float32)
    for tensor, values in zip(
        (layer.running_mean, layer.running_var, layer.weight, layer.bias), map(torch.from_numpy, stored), strict=True
    ):
        tensor.copy_(values)
    ours, theirs = (rng.normal(size=(6, 3)).astype(np.float32) * 2 for _ in range(2))
    student = copy.deepcopy(dense).train()
    correction = BatchCorrection(dense, student)
    with correction.observing():
        dense(torch.from_numpy(theirs))
        found = student(torch.from_numpy(ours)).numpy()
    mean, variance, weight, bias = stored.astype(np.float64)
    std = np.sqrt(variance + 0.01)
    normalized = (ours - ours.mean(0)) / np.sqrt(ours.var(0) + 0.01)
    normalized = normalized * np.sqrt(theirs.var(0) + 0.01) / std + (theirs.mean(0) - mean) / std
    assert found == pytest.approx(normalized * weight + bias, rel=1e-4, abs=1e-5)


def test_small_batches_of_a_pruned_network_differ_little_from_large_ones(dense: Net) -> None:
    """The noise of a batch's statistics is in both networks."""
    dense.own = nn.Identity()  # type: ignore[assignment]
    x, sparse = images(512, 0), pruned(dense)
    student, correction = corrected(dense, sparse)
    with correction.observing():
        dense(x)
        wanted = student(x)
    small, alone = [], []
    for part in x.split(8):
        with correction.observing():
            dense(part)
            small.append(student(part))
        with correction.observing():
            alone.append(student(part))
    corrected_error, error = (float((torch.cat(found) - wanted).abs().mean()) for found in (small, alone))
    assert corrected_error < 0.2 * error


def test_layers_called_twice_keep_both_corrections_for_the_backward_pass(dense: Net) -> None:
    student, correction = corrected(dense)
    x = images(4, 0).requires_grad_()
    with correction.observing():
        dense(x.detach())
        student(x).square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


class Frozen(nn.BatchNorm2d):
    """Stays in evaluation mode, as in networks that are fine-tuned with frozen statistics."""

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


def test_layers_that_stay_in_evaluation_mode_are_not_corrected(dense: Net) -> None:
    frozen = Frozen(8)
    frozen.load_state_dict(dense.norm.state_dict())
    dense.norm = frozen.eval().requires_grad_(False)  # type: ignore[assignment]
    student, correction = corrected(dense)
    with correction.observing():
        wanted, found = dense(images(8, 0)), student(images(8, 0))
    assert found.numpy() == pytest.approx(wanted.numpy(), abs=2e-4)


class Shifted(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 1


def test_layers_whose_weights_are_computed_normalize_by_the_batch(dense: Net) -> None:
    """A correction cannot be assigned to the output of a parametrization."""
    parametrize.register_parametrization(dense.norm, "weight", Shifted(), unsafe=True)
    student, correction = corrected(dense)
    x = images(8, 1)
    found: list[torch.Tensor] = []
    student.norm.register_forward_hook(lambda _, __, output: found.append(output))
    with correction.observing():
        dense(x)
        student(x)
    wanted = nn.functional.batch_norm(
        dense.first(x), None, None, dense.norm.weight, dense.norm.bias, training=True, eps=dense.norm.eps
    ).relu()
    assert found[0].numpy() == pytest.approx(wanted.numpy(), abs=1e-5)


def test_layers_of_other_float_types_keep_them() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3).bfloat16()).eval().requires_grad_(False)
    student = copy.deepcopy(net).train()
    correction = BatchCorrection(net, student)
    x = images(64, 2).bfloat16()
    with correction.observing():
        wanted, found = net(x), student(x)
    assert found.dtype == torch.bfloat16
    assert found.float().numpy() == pytest.approx(wanted.float().numpy(), abs=0.1, rel=0.02)


def test_a_layer_that_no_value_reaches_is_not_corrected(dense: Net) -> None:
    """And the calls after it have their own corrections."""
    net = nn.Sequential(nn.BatchNorm1d(3)).eval().requires_grad_(False)
    net.forward = lambda x: torch.cat([net[0](x[:0]) if not net[0].training else x[:0], net[0](x)])  # type: ignore[method-assign]
    student = copy.deepcopy(net).train()
    student.forward = lambda x: (student[0](x), student[0](x))[1]  # type: ignore[method-assign, assignment, return-value]
    x = torch.randn((6, 3), generator=torch.Generator().manual_seed(0))
    correction = BatchCorrection(net, student)
    with correction.observing():
        wanted, found = net(x), student(x)
    assert found.numpy() == pytest.approx(wanted.numpy(), abs=1e-5)


def test_outside_of_a_step_nothing_is_kept_or_corrected(dense: Net) -> None:
    student, _ = corrected(dense)
    before = student(images(4, 0))
    dense(images(4, 1))
    assert torch.equal(student(images(4, 0)), before)


def test_a_layer_that_the_dense_network_does_not_reach_is_not_corrected(dense: Net) -> None:
    student, correction = corrected(dense)
    before = student(images(4, 0))
    with correction.observing():
        dense(images(4, 1))
        student(images(4, 1))
    with correction.observing():
        assert student(images(4, 0)).numpy() == pytest.approx(before.numpy(), abs=1e-5)


def test_a_layer_of_several_calls_that_is_computed_again_is_refused(dense: Net) -> None:
    """By activation checkpointing: the corrections of the calls before the last are gone."""
    student, correction = corrected(dense)
    with correction.observing():
        dense(images(4, 0))
        student(images(4, 0))
    with pytest.raises(RuntimeError, match="plain"):
        student(images(4, 0))
