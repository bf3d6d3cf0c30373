"""What changes from step to step: images, temperature, learning rate, seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.data.augmentation import augmented
from maskplan.pipeline.data.dataset import Split, batches
from maskplan.pipeline.learning.options import LearnOptions


@dataclass(frozen=True)
class Batch:
    """One step's images (N, channels, H, W), labels (N,), and whether it is its epoch's last."""

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    ends_epoch: bool


def steps_per_epoch(train: Split, options: LearnOptions, processes: int = 1) -> int:
    """Full batches in an epoch; a set smaller than a batch is one batch."""
    return max(len(train) // (options.batch * processes), 1)


def training_batches(
    train: Split,
    preprocessing: Preprocessing,
    options: LearnOptions,
    start: int = 0,
    process: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """The images of every step from `start` on; epochs are in a fresh seeded order that the processes share out."""
    count = steps_per_epoch(train, options, processes)
    for epoch in range(start // count, options.epochs):
        order = np.random.default_rng((options.seed, epoch)).permutation(len(train))
        order = order[: count * options.batch * processes][process::processes]
        done = max(start - epoch * count, 0)
        left = batches(train, preprocessing, options.batch, order[done * options.batch :])
        for step, (x, labels) in enumerate(left, start=done + 1):
            seed = derive_seed(options.seed, process, epoch * count + step)
            yield Batch(augmented(x, options.augment, preprocessing, seed), labels, step == count)


def temperature(fraction: float, options: LearnOptions) -> float:
    """Falls geometrically; `fraction` is how much of the learning is done, 0 to 1."""
    return float(options.tau_start * (options.tau_end / options.tau_start) ** fraction)


def noise_scale(fraction: float, options: LearnOptions) -> float:
    """Goes in a straight line."""
    return options.noise_start + (options.noise_end - options.noise_start) * fraction


def learning_rate(fraction: float, options: LearnOptions) -> float:
    """Falls along half a cosine, to a hundredth."""
    return options.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fraction)))


def fraction_done(step: int, total: int, minutes: float, options: LearnOptions) -> float:
    """How much of the learning is done, 0 to 1, by steps or by the budget of time, whichever is further."""
    fraction = step / max(total - 1, 1)
    if options.budget_minutes is not None:
        fraction = max(fraction, minutes / options.budget_minutes if options.budget_minutes else 1.0)
    return min(fraction, 1.0)


def derive_seed(*parts: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
