"""Mask learning as described in Danhofer's semester report (2024, sections III and IV), for comparison.

Groups run along the rows of the flattened matrix (c_out, c_in * h * w), padded with zero columns to whole groups. Every
convolution is masked, including the stem and depthwise ones. Gate weights have Glorot initialization, biases are nearly
zero. SGD applies weight decay to the gates. Masks are sampled softly, also in evaluation. TensorRT does not accept these
groups for kernels larger than 1x1.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from maskplan.pipeline.core.artifacts import Learning, Pattern, Preprocessing
from maskplan.pipeline.core.choices import FLAT
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.data.dataset import Dataset, Split, batches
from maskplan.pipeline.learning.evaluate import MaskEvaluator, fraction_changed
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.learning.schedule import derive_seed, training_batches
from maskplan.pipeline.masking.patterns import pattern_table


@dataclass(frozen=True)
class DanhoferOptions:
    """The report's hyperparameters; a fair comparison searches `lr`.

    Attributes:
        epochs: Passes over the training images.
        batch: Images per step.
        lr: SGD's learning rate, divided by ten after every 30 epochs.
        momentum: SGD's momentum.
        decay: Weight decay of gate weights and biases.
        tau: Temperature, constant.
        seed: Seed of gates, noise and order of images.
    """

    epochs: int = 30
    batch: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    decay: float = 1e-4
    tau: float = 0.1
    seed: int = 0


class FlatGates(nn.Module):
    """Gates for the groups of one flattened weight; the last group of a row is padded with virtual zeros.

    Args:
        weight: (c_out, ...); groups run along the other axes, flattened.
        pattern: N:M.
        generator: For the initial values.
    """

    table: torch.Tensor

    def __init__(self, weight: torch.Tensor, pattern: Pattern, generator: torch.Generator) -> None:
        super().__init__()
        self.shape, self.columns = weight.shape, weight[0].numel()
        self.register_buffer("table", torch.from_numpy(pattern_table(pattern)).float(), persistent=False)
        groups, choices = len(weight) * math.ceil(self.columns / pattern.m), len(self.table)
        bound = math.sqrt(6 / (groups + choices))
        self.weight = nn.Parameter((2 * torch.rand(groups, choices, generator=generator) - 1) * bound)
        self.bias = nn.Parameter(1e-6 * torch.randn(choices, generator=generator))

    def sample(self, tau: float, generator: torch.Generator) -> torch.Tensor:
        """A soft sample of the mask (equation 2), shaped like the weight."""
        uniform = torch.rand(self.weight.shape, generator=generator).clamp_min(1e-20)
        noise = -torch.log(-torch.log(uniform))
        return self._expand(torch.softmax((self.weight + self.bias + noise) / tau, dim=-1))

    def argmax(self) -> torch.Tensor:
        """The likeliest mask, zeros and ones, shaped like the weight."""
        choice = (self.weight + self.bias).detach().argmax(dim=-1)
        return self._expand(F.one_hot(choice, len(self.table)).float())

    def _expand(self, choice: torch.Tensor) -> torch.Tensor:
        return (choice @ self.table).reshape(self.shape[0], -1)[:, : self.columns].reshape(self.shape)


class DanhoferNet(nn.Module):
    """A frozen network with the report's masking layer on every convolution; only the gates are parameters.

    Args:
        dense: The dense network; it is copied.
        options: The hyperparameters.
        pattern: N:M.
    """

    def __init__(self, dense: nn.Module, options: DanhoferOptions, pattern: Pattern) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(options.seed)
        # In a list, so that it is not registered: its weights are not parameters of this module.
        self._student = [copy.deepcopy(dense).requires_grad_(False)]
        convolutions = [n for n, m in dense.named_modules() if isinstance(m, _ConvNd)]
        parameters = dict(self._student[0].named_parameters())
        self._weights = {f"{name}.weight": parameters[f"{name}.weight"] for name in convolutions}
        self.gates = nn.ModuleList(FlatGates(w, pattern, generator) for w in self._weights.values())
        self._tau = options.tau

    def train(self, mode: bool = True) -> DanhoferNet:
        self._student[0].train(mode)
        return super().train(mode)

    def forward(self, images: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Logits (N, classes) under a new sample of all masks, or under the likeliest masks if there is no generator."""
        masks = [g.argmax() if generator is None else g.sample(self._tau, generator) for g in self._each()]
        masked = {n: w * m for (n, w), m in zip(self._weights.items(), masks, strict=True)}
        logits: torch.Tensor = functional_call(self._student[0], masked, (images,))
        return logits

    def masks(self) -> dict[str, npt.NDArray[np.bool_]]:
        """The likeliest masks by weight name."""
        return {n: g.argmax().numpy() > 0 for n, g in zip(self._weights, self._each(), strict=True)}

    def entropy(self) -> float:
        """Mean normalized entropy of the gates: 1 undecided, 0 decided."""
        entropies = []
        for gates in self._each():
            log_p = torch.log_softmax((gates.weight + gates.bias).detach(), dim=-1)
            entropies.append(float(-(log_p.exp() * log_p).sum(-1).mean() / math.log(len(gates.table))))
        return float(np.mean(entropies))

    def _each(self) -> list[FlatGates]:
        return [g for g in self.gates if isinstance(g, FlatGates)]


def learn_danhofer(
    dense: nn.Module, preprocessing: Preprocessing, data: Dataset, options: DanhoferOptions, pattern: Pattern
) -> DanhoferNet:
    """Train the gates as the report does; running BatchNorm statistics follow the sampled masks.

    Raises:
        InputError: The loss is not finite.
    """
    net = DanhoferNet(dense, options, pattern).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=options.lr, momentum=options.momentum, weight_decay=options.decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 30, 0.1)
    order = LearnOptions(epochs=options.epochs, batch=options.batch, augment="crop", seed=options.seed)
    total = options.epochs * max(len(data.train) // options.batch, 1)
    steps = enumerate(training_batches(data.train, preprocessing, order))
    for step, batch in track(steps, "learn masks (danhofer2024)", total):
        generator = torch.Generator().manual_seed(derive_seed(options.seed, step))
        loss = F.cross_entropy(net(torch.from_numpy(batch.images), generator), torch.from_numpy(batch.labels))
        if not bool(loss.isfinite()):
            raise InputError("the loss is not finite", where=f"step {step + 1}", fix="lower the learning rate")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if batch.ends_epoch:
            schedule.step()
    return net.eval()


def danhofer_masks(
    dense: nn.Module,
    start: Mapping[str, npt.NDArray[np.bool_]],
    preprocessing: Preprocessing,
    data: Dataset,
    options: DanhoferOptions,
    pattern: Pattern,
) -> tuple[dict[str, npt.NDArray[np.bool_]], Learning]:
    """Learn masks of all convolutions; score the likeliest ones and the `start` masks on `select`.

    Both are scored as the learner scores its masks: recalibrated, and against the dense network.
    """
    evaluate = MaskEvaluator(dense, preprocessing, data, LearnOptions(batch=options.batch, seed=options.seed))
    started = time.monotonic()
    masks = learn_danhofer(dense, preprocessing, data, options, pattern).masks()
    seconds = time.monotonic() - started
    first, last = evaluate(dict(start)), evaluate(masks)
    return masks, Learning(
        recipe="danhofer2024",
        epochs=options.epochs,
        steps=options.epochs * max(len(data.train) // options.batch, 1),
        images=len(data.train),
        seconds=round(seconds, 3),
        groups_changed=fraction_changed(dict(start), masks, pattern.m, FLAT),
        select_divergence_start=first.divergence,
        select_divergence_end=last.divergence,
        select_top1_start=first.top1,
        select_top1_end=last.top1,
    )


def correct_predictions(
    net: DanhoferNet, split: Split, preprocessing: Preprocessing, *, sampled: bool, seed: int = 0
) -> list[bool]:
    """For each image, whether its prediction is correct: under masks sampled for every batch, or under the likeliest."""
    generator = torch.Generator().manual_seed(seed) if sampled else None
    correct: list[bool] = []
    with torch.no_grad():
        for x, labels in batches(split, preprocessing, 500):
            correct += (net(torch.from_numpy(x), generator).argmax(1).numpy() == labels).tolist()
    return correct


def conv_by_unfolding(x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int) -> torch.Tensor:
    """A convolution as one matrix product (equation 4): W (c_out, c_in * h * w) times the unfolded input.

    Args:
        x: (N, c_in, H, W).
        weight: (c_out, c_in, h, w).
        stride: Along both axes.
        padding: Along both axes.

    Returns:
        (N, c_out, H', W'), with H' = (H + 2 * padding - h) // stride + 1.
    """
    columns = F.unfold(x, weight.shape[2:], padding=padding, stride=stride)
    height = (x.shape[2] + 2 * padding - weight.shape[2]) // stride + 1
    return (weight.flatten(1) @ columns).reshape(len(x), len(weight), height, -1)
