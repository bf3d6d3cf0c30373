"""What a time budget is enough for: learning from magnitude masks, a shorter way from layer-wise masks, or these alone."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from maskplan.pipeline.core.artifacts import OutputKind, Pattern, Preprocessing
from maskplan.pipeline.core.files import write_atomically
from maskplan.pipeline.data.dataset import Dataset
from maskplan.pipeline.learning.masked_net import MaskedNet
from maskplan.pipeline.learning.options import LearnerFiles, LearnOptions, block_files
from maskplan.pipeline.learning.output_loss import output_loss
from maskplan.pipeline.learning.schedule import training_batches
from maskplan.pipeline.models.device import choose_device

log = logging.getLogger(__name__)

Strategy = Literal["full", "short", "layerwise"]
FULL, SHORT, LAYERWISE_ONLY = STRATEGIES = cast("tuple[Strategy, Strategy, Strategy]", get_args(Strategy))

# Images that learning has to run over before it gains on layer-wise masks, and epochs below which it starts from them.
_MIN_IMAGES, _MIN_EPOCHS = 2000, 5
_TIMED_STEPS = 2


def choose_strategy(images_in_budget: float, train_images: int) -> Strategy:
    """The strategy for a number of images that learning can run over, repetitions included."""
    if images_in_budget < _MIN_IMAGES:
        return LAYERWISE_ONLY
    return FULL if images_in_budget >= _MIN_EPOCHS * train_images else SHORT


def strategy_for_budget(
    options: LearnOptions,
    train_images: int,
    seconds_per_image: Callable[[], float],
    files: LearnerFiles | None = None,
    *,
    few_images: bool = False,
) -> Strategy:
    """Choose by what fits the budget on this host.

    An interrupted run that is resumed with the same budget continues with the strategy that it began with, which is kept
    next to its checkpoint. Under `torchrun` hosts would disagree: the strategy is then `full`.

    Args:
        options: With a budget; without one, the strategy is `full`.
        train_images: Size of the part that masks are learned on.
        seconds_per_image: Measures a step of learning; called if the strategy is not known.
        files: Files of the learner, if it writes any.
        few_images: Learning is in the setting for few images.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or options.budget_minutes is None:
        return FULL
    checkpoint = files.checkpoint if files is not None else None
    memory = strategy_file(checkpoint) if checkpoint is not None else None
    if files is not None and memory is not None and _resumes(files) and memory.is_file():
        known, _, minutes = memory.read_text(encoding="utf-8", errors="replace").strip().partition(" ")
        if known in STRATEGIES and minutes == f"{options.budget_minutes:g}":
            return known
    count = 60 * options.budget_minutes / seconds_per_image()
    strategy = choose_strategy(count, train_images)
    what = {
        FULL: f"masks are learned from {'layer-wise' if few_images else 'magnitude'} masks",
        SHORT: "masks are learned from layer-wise masks, with the features inside matched",
        LAYERWISE_ONLY: "layer-wise masks, without learning",
    }[strategy]
    log.info("%g minutes are about %.0f images: %s", options.budget_minutes, count, what)
    if memory is not None:
        write_atomically(memory, f"{strategy} {options.budget_minutes:g}".encode())
    return strategy


def _resumes(files: LearnerFiles) -> bool:
    """Whether a checkpoint is there to resume from, of either phase."""
    found = (files.checkpoint, block_files(files).checkpoint)
    return files.resume and any(checkpoint is not None and checkpoint.is_file() for checkpoint in found)


def strategy_file(checkpoint: Path) -> Path:
    """Where the strategy of an interrupted run is kept."""
    return checkpoint.with_name(f"{checkpoint.name}.strategy")


def seconds_per_image(
    module: nn.Module,
    masks: Mapping[str, npt.NDArray[np.bool_]],
    pattern: Pattern,
    preprocessing: Preprocessing,
    data: Dataset,
    options: LearnOptions,
    kinds: Sequence[OutputKind],
    device: str,
) -> float:
    """Time a few steps of learning, without its optimizer.

    Args:
        module: The dense model.
        masks: Masks of the layers to learn, of any kind.
        pattern: N:M.
        preprocessing: Preprocessing of the images.
        data: The images.
        options: Batch size and gates.
        kinds: What the network returns; empty for a classifier.
        device: `auto`, `cpu` or `cuda`.
    """
    place = choose_device(device)
    teacher = copy.deepcopy(module).eval().requires_grad_(False).to(place)
    loss = output_loss(teacher, kinds, data.select, preprocessing, options.batch)
    net = MaskedNet(copy.deepcopy(teacher), list(masks), pattern, options.init_std, hard=options.hard).to(place)
    batch = next(training_batches(data.train, preprocessing, replace(options, epochs=1)))
    images = torch.from_numpy(batch.images).to(place)
    seeds = [0] * len(net.logits())
    times = []
    for _ in range(1 + _TIMED_STEPS):
        started = time.monotonic()
        with torch.autocast(place.type, torch.bfloat16, enabled=place.type == "cuda"):
            with torch.no_grad():
                target = loss.select(teacher(images.clone()))
            returned, _kept = net(images, 1.0, 0.0, seeds)
        own, dense = (tuple(tensor.float() for tensor in outputs) for outputs in (loss.select(returned), target))
        value = loss(own, dense, options.distill_temperature)
        value.backward()  # type: ignore[no-untyped-call]
        float(value.detach())
        times.append(time.monotonic() - started)
    # The first step compiles and allocates.
    return min(times[1:]) / len(images)
