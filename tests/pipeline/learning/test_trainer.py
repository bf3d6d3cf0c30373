"""Learned masks: the result, what does not change, and that a known best mask is found."""

from __future__ import annotations

import copy
import csv
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gray_images import PREPROCESSING, GrayImages, dataset, random_images
from torch import nn

from maskplan.pipeline.core.artifacts import Learning, Pattern
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.learning.evaluate import MaskEvaluator, MaskScore
from maskplan.pipeline.learning.learner import Learner
from maskplan.pipeline.learning.masked_net import Masks
from maskplan.pipeline.learning.options import LearnerFiles, LearnOptions
from maskplan.pipeline.learning.processes import join_processes
from maskplan.pipeline.learning.schedule import Batch
from maskplan.pipeline.learning.trainer import learn_masks
from maskplan.pipeline.models.batchnorm import RecalibrateOptions, dense_statistics, update_statistics

TWO_FOUR = Pattern(2, 4)


class Net(nn.Module):
    """Two convolutions and a head that can be masked, with and without biases, BatchNorm between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 12, (1, 3), bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.narrow = nn.Conv2d(12, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.stem(x)))
        x = torch.relu(self.bn2(self.wide(x)))
        return self.head(self.narrow(x).mean((2, 3)))


NAMES = ("wide.weight", "narrow.weight", "head.weight")


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    made = Net()
    update_statistics(made, dataset(random_images(36), 24).train, PREPROCESSING, RecalibrateOptions())
    return made


def magnitude(module: nn.Module, names: tuple[str, ...], pattern: Pattern = TWO_FOUR) -> Masks:
    """Keep the N largest of each group along C, by sorting."""
    masks = {}
    for name in names:
        moved = np.moveaxis(np.abs(module.state_dict()[name].numpy()), 1, -1)
        ranks = np.argsort(np.argsort(-moved.reshape(-1, pattern.m), axis=1, kind="stable"), axis=1)
        masks[name] = np.ascontiguousarray(np.moveaxis((ranks < pattern.n).reshape(moved.shape), -1, 1))
    return masks


def fingerprint(module: nn.Module) -> dict[str, bytes]:
    """All bytes of all parameters and buffers, also those that a state dict leaves out."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in named}


def same(a: Masks, b: Masks) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def groups(mask: npt.NDArray[Any], m: int) -> npt.NDArray[Any]:
    """(all groups, M), by hand."""
    rows = [mask[k, :, *tap] for k in range(len(mask)) for tap in np.ndindex(*mask.shape[2:])]
    return np.concatenate([np.stack([row[i : i + m] for i in range(0, len(row), m)]) for row in rows])


# A problem whose best mask is known -----------------------------------------------------------------------------------


def cancelling() -> tuple[nn.Module, GrayImages]:
    """Eight pixels into three logits, where the largest weights do nothing.

    Pixels 0 and 1 are nearly the same and their weights nearly cancel; 4 and 6 are always near the mean, which is taken off.
    The labels are the dense model's own.
    """
    rng = np.random.default_rng(5)
    values = rng.integers(0, 256, (160, 8))
    values[:, 1] = values[:, 0] + rng.integers(-3, 4, 160)
    values[:, [4, 6]] = rng.integers(125, 131, (160, 2))
    values = values.clip(0, 255).astype(np.uint8)
    module = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    weight = [
        [2.0, -2.1, 0.9, 0.6, 1.5, -0.8, 1.2, 0.5],
        [-1.9, 1.8, -0.5, 1.0, -1.4, 0.4, 1.6, 0.9],
        [1.7, -1.6, 0.3, -0.8, 1.1, 0.7, -1.3, -0.6],
    ]
    with torch.no_grad():
        module[1].weight.copy_(torch.tensor(weight))
        module[1].bias.copy_(torch.tensor([0.1, -0.2, 0.0]))
        labels = module((torch.from_numpy(values).float() / 255 - 0.5) / 0.25).argmax(dim=1).numpy()
    return module.eval(), GrayImages(values, labels)


def logits_of(weight: npt.NDArray[Any], module: nn.Module, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    x = (images.astype(np.float64) / 255 - 0.5) / 0.25
    return np.asarray(np.einsum("...kc,nc->...nk", weight, x) + module.state_dict()["1.bias"].double().numpy())


def divergence(student: npt.NDArray[np.float64], teacher: npt.NDArray[np.float64], distill_temperature: float) -> Any:
    """KL divergence from the teacher's softened probabilities, mean over images, times the temperature squared."""

    def log_softmax(z: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        z = z / distill_temperature
        return np.asarray(z - np.log(np.exp(z).sum(axis=-1, keepdims=True)))

    p, q = log_softmax(student), log_softmax(teacher)
    return distill_temperature**2 * (np.exp(q) * (q - p)).sum(axis=-1).mean(axis=-1)


def every_mask() -> npt.NDArray[np.bool_]:
    """All 46,656 masks of a weight (3, 8)."""
    table = np.array([[i in kept for i in range(4)] for kept in itertools.combinations(range(4), 2)])
    choices = np.array(list(itertools.product(range(6), repeat=6)))
    return table[choices].reshape(-1, 3, 8)


def learn(module: nn.Module, files: LearnerFiles | None = None, **options: Any) -> tuple[Masks, Learning]:
    """Learn on 24 images, from the worst masks, which any other are better than."""
    start = {name: ~mask for name, mask in magnitude(module, NAMES).items()}
    learn_options = LearnOptions(batch=8, **options)
    data = dataset(random_images(36), 24)
    return learn_masks(module, start, TWO_FOUR, PREPROCESSING, data, learn_options, files=files)


def test_learning_finds_the_best_of_all_masks_where_the_magnitude_mask_is_not() -> None:
    module, images = cancelling()
    data = dataset(images, 96)
    weight = module.state_dict()["1.weight"].double().numpy()
    shown = images.pixels[data.select.indices]
    masks = every_mask()
    dense = logits_of(weight, module, shown)
    found = np.concatenate([divergence(logits_of(m * weight, module, shown), dense, 2.0) for m in np.split(masks, 24)])
    best, second = np.argsort(found)[:2]
    start = magnitude(module, ("1.weight",))
    at_start = int(np.flatnonzero((masks == start["1.weight"]).all(axis=(1, 2)))[0])
    assert found[at_start] > 20 * found[best]
    assert found[second] > 1.2 * found[best]

    options = LearnOptions(epochs=40, batch=16, lr=0.1, init_std=0.5)
    learned, _ = learn_masks(module, start, TWO_FOUR, PREPROCESSING, data, options)
    assert np.array_equal(learned["1.weight"], masks[best])


def test_reported_scores_are_those_of_the_masks_on_select() -> None:
    module, images = cancelling()
    data = dataset(images, 96)
    options = LearnOptions(epochs=10, batch=16, lr=0.1, init_std=0.5, distill_temperature=1.5)
    start = magnitude(module, ("1.weight",))
    learned, learning = learn_masks(module, start, TWO_FOUR, PREPROCESSING, data, options)
    weight = module.state_dict()["1.weight"].double().numpy()
    dense = logits_of(weight, module, images.pixels[96:])
    for masks, divergent, top1 in (
        (start, learning.select_divergence_start, learning.select_top1_start),
        (learned, learning.select_divergence_end, learning.select_top1_end),
    ):
        logits = logits_of(masks["1.weight"] * weight, module, images.pixels[96:])
        assert divergent == pytest.approx(divergence(logits, dense, 1.5), rel=1e-4)
        assert top1 == pytest.approx(100 * (logits.argmax(axis=1) == images.labels[96:]).mean())
    changed = (groups(start["1.weight"], 4) != groups(learned["1.weight"], 4)).any(axis=1)
    assert learning.groups_changed == pytest.approx(changed.mean())
    assert learning.select_divergence_end < learning.select_divergence_start
    assert (learning.epochs, learning.steps, learning.images) == (10, 60, 96)


def test_masks_are_scored_with_batchnorm_statistics_of_the_masked_network(net: Net) -> None:
    """All 24 training images are one batch, so that its mean and variance are the statistics."""
    for norm in (net.bn1, net.bn2):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    images, start = random_images(36), magnitude(net, NAMES)
    options = LearnOptions(epochs=0, judge_relative=False)
    _, learning = learn_masks(net, start, TWO_FOUR, PREPROCESSING, dataset(images, 24), options)
    x = ((torch.from_numpy(images.pixels).float() / 255 - 0.5) / 0.25).reshape(-1, 1, 2, 4)
    masked = copy.deepcopy(net)
    with torch.no_grad():
        for name, mask in start.items():
            dict(masked.named_parameters())[name].mul_(torch.from_numpy(mask))
        for norm in (masked.bn1, masked.bn2):
            norm.momentum = 1.0
        masked.train()(x[:24])
        logits, dense = (m.eval()(x[24:]).double().numpy() for m in (masked, net))
    assert learning.select_divergence_start == pytest.approx(divergence(logits, dense, 2.0), rel=1e-3)


@pytest.fixture
def other_statistics(net: Net) -> Net:
    """BatchNorm statistics as of other images."""
    for norm in (net.bn1, net.bn2):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.05, 0.5)
    return net


def test_masks_are_scored_with_statistics_relative_to_the_dense_network(other_statistics: Net) -> None:
    net, images, start = other_statistics, random_images(36), magnitude(other_statistics, NAMES)
    data, options = dataset(images, 24), RecalibrateOptions()
    _, learning = learn_masks(net, start, TWO_FOUR, PREPROCESSING, data, LearnOptions(epochs=0))
    masked = copy.deepcopy(net)
    with torch.no_grad():
        for name, mask in start.items():
            masked.get_parameter(name).mul_(torch.from_numpy(mask))
        reference = dense_statistics(net, data.train, PREPROCESSING, options)
        update_statistics(masked, data.train, PREPROCESSING, options, reference)
        x = ((torch.from_numpy(images.pixels[24:]).float() / 255 - 0.5) / 0.25).reshape(-1, 1, 2, 4)
        logits, dense = (m(x).double().numpy() for m in (masked, net))
    assert learning.select_divergence_start == pytest.approx(divergence(logits, dense, 2.0), rel=1e-3)


@pytest.mark.parametrize("distill", [1.0, 0.3, 0.0])
def test_masks_are_scored_by_the_loss_that_they_are_learned_by(distill: float, net: Net) -> None:
    images = random_images(36)
    options = LearnOptions(distill=distill, batch=5)
    # Without masks and with relative statistics, the network is the dense one.
    score = MaskEvaluator(net.eval(), PREPROCESSING, dataset(images, 24), options)({})
    x = ((torch.from_numpy(images.pixels[24:]).float() / 255 - 0.5) / 0.25).reshape(-1, 1, 2, 4)
    with torch.no_grad():
        logits = net(x).double().numpy()
    cross_entropy = np.log(np.exp(logits).sum(1)) - logits[np.arange(12), images.labels[24:]]
    assert score.divergence == pytest.approx(0, abs=1e-6)
    assert score.loss == pytest.approx((1 - distill) * cross_entropy.mean(), rel=1e-4, abs=1e-6)


def test_the_epoch_of_the_lowest_loss_is_kept(net: Net, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which with labels need not be the one of the lowest divergence; the log shows both."""
    scores = iter([MaskScore(0.1, None, 0.5), MaskScore(0.3, None, 0.4), MaskScore(0.2, None, 0.6)])
    monkeypatch.setattr(MaskEvaluator, "__call__", lambda *_: next(scores))
    _, learning = learn(net, LearnerFiles(log_dir=tmp_path), epochs=2, distill=0.5)
    assert (learning.select_divergence_start, learning.select_divergence_end) == (0.1, 0.3)
    rows = list(csv.DictReader((tmp_path / "learning.csv").read_text().splitlines()))
    assert [(row["select_divergence"], row["select_loss"]) for row in rows] == [("0.3", "0.4"), ("0.2", "0.6")]


@pytest.mark.parametrize("is_relative", [True, False])
def test_a_network_that_masks_do_not_change_has_no_loss(is_relative: bool, other_statistics: Net) -> None:
    """Although it normalizes by the batch; where statistics are those of the images, so is the loss."""
    net, images = other_statistics, random_images(36)
    start = magnitude(net, NAMES)
    with torch.no_grad():
        for name, mask in start.items():
            net.get_parameter(name).mul_(torch.from_numpy(mask))
    data, options = dataset(images, 24), LearnOptions(judge_relative=is_relative, noise_start=0.0)
    with join_processes("cpu") as process:
        learner = Learner(
            net, start, TWO_FOUR, PREPROCESSING, data, options, process, LearnerFiles(), favor_start=False
        )
        x = ((torch.from_numpy(images.pixels[:8]).float() / 255 - 0.5) / 0.25).reshape(-1, 1, 2, 4)
        batch = Batch(x.numpy(), images.labels[:8], ends_epoch=False)
        loss, _ = learner._forward(batch, 0.0, learner._initial_progress())
    recalibrated = copy.deepcopy(net)
    if not is_relative:
        recalibrated.train()
    with torch.no_grad():
        wanted = divergence(recalibrated(x).double().numpy(), net(x).double().numpy(), 2.0)
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-3, abs=1e-6)


# The result -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2)])
def test_the_masks_have_the_weights_shapes_and_keep_n_of_each_group(net: Net, n: int, m: int) -> None:
    start = {name: np.ascontiguousarray(mask[::-1]) for name, mask in magnitude(net, NAMES, Pattern(n, m)).items()}
    options = LearnOptions(epochs=4, batch=8, lr=1.0, init_std=0.1)
    masks, learning = learn_masks(net, start, Pattern(n, m), PREPROCESSING, dataset(random_images(36), 24), options)
    assert masks.keys() == start.keys()
    for name, mask in masks.items():
        assert mask.dtype == np.bool_
        assert mask.shape == net.state_dict()[name].shape
        assert (groups(mask, m).sum(axis=1) == n).all()
    assert learning.groups_changed > 0


def test_zero_epochs_return_the_start_masks(net: Net) -> None:
    start = {name: np.ascontiguousarray(mask[::-1]) for name, mask in magnitude(net, NAMES).items()}
    masks, learning = learn_masks(
        net, start, TWO_FOUR, PREPROCESSING, dataset(random_images(36), 24), LearnOptions(epochs=0)
    )
    assert same(masks, {name: mask[::-1] for name, mask in magnitude(net, NAMES).items()})
    assert (learning.epochs, learning.steps, learning.groups_changed) == (0, 0, 0)
    assert learning.select_divergence_start == learning.select_divergence_end
    assert learning.select_top1_start == learning.select_top1_end


def test_start_masks_are_returned_if_no_epoch_is_better() -> None:
    """The given masks are the best of all, and learning is far too coarse to find them."""
    module, images = cancelling()
    best = {"1.weight": np.tile(np.array([0, 0, 1, 1, 0, 1, 0, 1], np.bool_), (3, 1))}
    options = LearnOptions(epochs=3, batch=16, lr=5.0)
    masks, learning = learn_masks(module, best, TWO_FOUR, PREPROCESSING, dataset(images, 96), options)
    assert same(masks, best)
    assert learning.groups_changed == 0
    assert learning.select_divergence_end == learning.select_divergence_start


def test_masks_depend_on_the_seed_and_not_on_global_random_state(net: Net) -> None:
    options = {"epochs": 4, "lr": 0.5, "init_std": 0.1}
    torch.manual_seed(1)
    masks, learning = learn(net, **options, seed=7)
    torch.manual_seed(2)
    again, learning_again = learn(net, **options, seed=7)
    assert same(masks, again)
    assert dataclasses.replace(learning, seconds=0) == dataclasses.replace(learning_again, seconds=0)
    other, _ = learn(net, **options, seed=8)
    assert not same(masks, other)


@pytest.mark.parametrize("budget", [1e-9, 0.0])
def test_learning_ends_with_valid_masks_when_the_time_budget_is_used_up(net: Net, budget: float) -> None:
    masks, learning = learn(net, epochs=1000, budget_minutes=budget)
    assert learning.steps < 10
    assert learning.epochs <= learning.steps
    assert all((groups(mask, 4).sum(axis=1) == 2).all() for mask in masks.values())


@pytest.mark.parametrize(("train", "batch", "steps"), [(24, 8, 3), (23, 8, 2), (5, 8, 1), (2, 64, 1)])
def test_sets_smaller_than_a_batch_or_not_a_multiple_of_it_are_learned_from(
    net: Net, train: int, batch: int, steps: int
) -> None:
    options = LearnOptions(epochs=2, batch=batch, budget_minutes=60)
    data = dataset(random_images(train + 3), train)
    _, learning = learn_masks(net, magnitude(net, NAMES), TWO_FOUR, PREPROCESSING, data, options)
    assert (learning.epochs, learning.steps, learning.images) == (2, 2 * steps, train)


@pytest.mark.parametrize("train", [0, 1])
def test_too_few_images_are_an_error(net: Net, train: int) -> None:
    with pytest.raises(InputError, match=f"too few images to learn from\n.*{train} to learn from"):
        learn_masks(
            net,
            magnitude(net, NAMES),
            TWO_FOUR,
            PREPROCESSING,
            dataset(random_images(9), train),
            LearnOptions(epochs=1),
        )


def test_a_shared_weight_has_one_mask() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten())
    module[3].weight = module[1].weight
    start = magnitude(module, ("1.weight", "3.weight"))
    options = LearnOptions(epochs=4, batch=8, lr=1.0, init_std=0.1)
    masks, _ = learn_masks(module, start, TWO_FOUR, PREPROCESSING, dataset(random_images(36), 24), options)
    assert np.array_equal(masks["1.weight"], masks["3.weight"])


# What does not change -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_the_model_is_bit_identical_after_learning(net: Net, mode: bool) -> None:
    net.train(mode)
    before = fingerprint(net)
    _, learning = learn(net, epochs=3, lr=1.0, init_std=0.1)
    assert learning.steps == 9
    assert fingerprint(net) == before
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("error", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (RuntimeError("out of memory"), (RuntimeError, InputError))],
    ids=["interrupt", "failure"],
)
@pytest.mark.parametrize(("after", "in_backward"), [(0, False), (3, False), (9, False), (0, True), (9, True)])
def test_the_model_is_bit_identical_after_an_error(
    net: Net, error: BaseException, raised: Any, after: int, in_backward: bool
) -> None:
    """The error comes in a forward pass, or in the first backward pass after it; copies of the model share the count."""
    passed = itertools.count()

    def stop(*_: Any) -> None:
        raise error

    def note(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if next(passed) >= after:
            if not in_backward:
                stop()
            if output.requires_grad:
                output.register_hook(stop)

    net.register_forward_hook(note)
    before = fingerprint(net)
    with pytest.raises(raised, match=str(error) or "^$"):
        learn(net, epochs=5, lr=1.0, init_std=0.1)
    assert fingerprint(net) == before
    assert all(p.grad is None for p in net.parameters())


def test_a_loss_that_is_not_finite_is_an_error_and_the_model_is_unchanged(net: Net) -> None:
    with torch.no_grad():
        net.head.weight.fill_(3e38)
    before = fingerprint(net)
    with pytest.raises(InputError, match="not finite"):
        learn(net, epochs=3)
    assert fingerprint(net) == before
