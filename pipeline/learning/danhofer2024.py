"""The semester report's way to learn masks, as it is written, to compare with (Danhofer 2024, sections III and IV).

Groups run along the rows of the flattened matrix (c_out, c_in * h * w), to which columns are added until they are whole;
every convolution is masked, stem and depthwise ones included; gate weights are Glorot's, biases nearly zero; SGD with decay
on the gates; masks are sampled softly, in evaluation too. TensorRT does not accept these groups for kernels larger than 1x1.
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
    """The report's numbers; `rate` is the one that a fair comparison searches.

    Attributes:
        epochs: Passes over the training images.
        batch: Images a step.
        rate: SGD's learning rate, a tenth of it after every 30 epochs.
        momentum: SGD's.
        decay: On gate weights and biases.
        tau: Temperature, always.
        seed: Of gates, noise and order.
    """

    epochs: int = 30
    batch: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    decay: float = 1e-4
    tau: float = 0.1
    seed: int = 0


class FlatGates(nn.Module):
    """Choices for the groups of one flattened weight; the last of a row is padded with virtual entries, always zero.

    Args:
        weight: (c_out, ...); groups run along the rest, in storage order.
        pattern: N:M.
        generator: Of the initial values.
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
        """A soft sample (equation 2), shaped like the weight."""
        uniform = torch.rand(self.weight.shape, generator=generator).clamp_min(1e-20)
        noise = -torch.log(-torch.log(uniform))
        return self._spread(torch.softmax((self.weight + self.bias + noise) / tau, dim=-1))

    def argmax(self) -> torch.Tensor:
        """The likeliest mask, of zeros and ones."""
        choice = (self.weight + self.bias).detach().argmax(dim=-1)
        return self._spread(F.one_hot(choice, len(self.table)).float())

    def _spread(self, choice: torch.Tensor) -> torch.Tensor:
        return (choice @ self.table).reshape(self.shape[0], -1)[:, : self.columns].reshape(self.shape)


class DanhoferNet(nn.Module):
    """A frozen network with the report's masking layer at every convolution; only the gates are parameters.

    Args:
        dense: The dense network; it is copied.
        options: The report's numbers.
        pattern: N:M.
    """

    def __init__(self, dense: nn.Module, options: DanhoferOptions, pattern: Pattern) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(options.seed)
        # Its weights are no parameters of this module.
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
        """Logits under a fresh sample of all masks, or under the likeliest masks without a generator."""
        masks = [g.argmax() if generator is None else g.sample(self._tau, generator) for g in self._each()]
        masked = {n: w * m for (n, w), m in zip(self._weights.items(), masks, strict=True)}
        logits: torch.Tensor = functional_call(self._student[0], masked, (images,))
        return logits

    def masks(self) -> dict[str, npt.NDArray[np.bool_]]:
        """The likeliest masks by weight name."""
        return {n: g.argmax().numpy() > 0 for n, g in zip(self._weights, self._each(), strict=True)}

    def entropy(self) -> float:
        """Mean entropy of the choices; 1 undecided, 0 decided."""
        found = []
        for gates in self._each():
            log_p = torch.log_softmax((gates.weight + gates.bias).detach(), dim=-1)
            found.append(float(-(log_p.exp() * log_p).sum(-1).mean() / math.log(len(gates.table))))
        return float(np.mean(found))

    def _each(self) -> list[FlatGates]:
        return [g for g in self.gates if isinstance(g, FlatGates)]


def learn_danhofer(
    dense: nn.Module, preprocessing: Preprocessing, data: Dataset, options: DanhoferOptions, pattern: Pattern
) -> DanhoferNet:
    """Train the gates as the report did; its BatchNorm statistics follow the sampled masks."""
    net = DanhoferNet(dense, options, pattern).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=options.lr, momentum=options.momentum, weight_decay=options.decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 30, 0.1)
    order = LearnOptions(epochs=options.epochs, batch=options.batch, augment="crop", seed=options.seed)
    total = options.epochs * max(len(data.train) // options.batch, 1)
    steps = enumerate(training_batches(data.train, preprocessing, order))
    for step, batch in track(steps, "learn as reported", total):
        generator = torch.Generator().manual_seed(derive_seed(options.seed, step))
        loss = F.cross_entropy(net(torch.from_numpy(batch.images), generator), torch.from_numpy(batch.labels))
        if not bool(loss.isfinite()):
            raise InputError("the loss is not a number", where=f"step {step + 1}", fix="lower the learning rate")
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
    """The likeliest masks of all convolutions, and how they stand against others (those by magnitude) on `select`.

    Both are judged by our means: recalibrated, and against the dense network.
    """
    judge = MaskEvaluator(dense, preprocessing, data, LearnOptions(batch=options.batch, seed=options.seed))
    started = time.monotonic()
    masks = learn_danhofer(dense, preprocessing, data, options, pattern).masks()
    seconds = time.monotonic() - started
    first, last = judge(dict(start)), judge(masks)
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
    """Which images are right, under masks sampled anew for every batch, or under the likeliest."""
    generator = torch.Generator().manual_seed(seed) if sampled else None
    right: list[bool] = []
    with torch.no_grad():
        for x, labels in batches(split, preprocessing, 500):
            right += (net(torch.from_numpy(x), generator).argmax(1).numpy() == labels).tolist()
    return right


def unfolded(x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int) -> torch.Tensor:
    """A convolution as one matrix product (equation 4): W (c_out, c_in * h * w) times the unfolded input.

    Args:
        x: (N, c_in, H, W).
        weight: (c_out, c_in, h, w).
        stride: Of both axes.
        padding: Of both axes.

    Returns:
        (N, c_out, H', W'), with H' = (H + 2 * padding - h) // stride + 1.
    """
    columns = F.unfold(x, weight.shape[2:], padding=padding, stride=stride)
    height = (x.shape[2] + 2 * padding - weight.shape[2]) // stride + 1
    return (weight.flatten(1) @ columns).reshape(len(x), len(weight), height, -1)
