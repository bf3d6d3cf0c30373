"""What changes from step to step: images, temperature, noise, learning rate and seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.data.augmentation import augment_images
from maskplan.pipeline.data.dataset import Split, batches
from maskplan.pipeline.learning.options import LearnOptions


@dataclass(frozen=True)
class Batch:
    """One step's images (N, channels, H, W), labels (N,), and whether it is the last step of its epoch."""

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    ends_epoch: bool


def steps_per_epoch(train: Split, options: LearnOptions, processes: int = 1) -> int:
    """Number of full batches per epoch; a set smaller than one batch counts as one."""
    return max(len(train) // (options.batch * processes), 1)


def training_batches(
    train: Split,
    preprocessing: Preprocessing,
    options: LearnOptions,
    start: int = 0,
    process: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """Yield the batches of all steps from `start` on.

    Each epoch has its own seeded order of images, which is divided among the processes.

    Args:
        train: The training images.
        preprocessing: Preprocessing of the images.
        options: Batch size, epochs, augmentation and seed.
        start: First step to yield, counted over all epochs.
        process: Rank of this process.
        processes: Number of processes.
    """
    count = steps_per_epoch(train, options, processes)
    for epoch in range(start // count, options.epochs):
        order = np.random.default_rng((options.seed, epoch)).permutation(len(train))
        order = order[: count * options.batch * processes][process::processes]
        done = max(start - epoch * count, 0)
        remaining = batches(train, preprocessing, options.batch, order[done * options.batch :])
        for step, (x, labels) in enumerate(remaining, start=done + 1):
            seed = derive_seed(options.seed, process, epoch * count + step)
            yield Batch(augment_images(x, options.augment, preprocessing, seed), labels, step == count)


def temperature(fraction: float, options: LearnOptions) -> float:
    """Temperature, interpolated geometrically; `fraction` is the finished part of learning, 0 to 1."""
    return float(options.tau_start * (options.tau_end / options.tau_start) ** fraction)


def noise_scale(fraction: float, options: LearnOptions) -> float:
    """Scale of the Gumbel noise, interpolated linearly."""
    return options.noise_start + (options.noise_end - options.noise_start) * fraction


def learning_rate(fraction: float, options: LearnOptions) -> float:
    """Learning rate, decayed along half a cosine to a hundredth of its peak."""
    return options.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fraction)))


def fraction_done(step: int, total: int, minutes: float, options: LearnOptions) -> float:
    """Finished part of learning, 0 to 1: by steps or by the time budget, whichever is larger."""
    fraction = step / max(total - 1, 1)
    if options.budget_minutes is not None:
        fraction = max(fraction, minutes / options.budget_minutes if options.budget_minutes else 1.0)
    return min(fraction, 1.0)


def derive_seed(*parts: int) -> int:
    """Derive one 63-bit seed from several non-negative integers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
