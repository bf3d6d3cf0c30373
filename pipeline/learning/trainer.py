"""Learn masks while the weights stay as they are, in one phase or two.

First each block may be matched by itself (`match_blocks`); the whole network then starts from the masks of this phase.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from maskplan.pipeline.core.artifacts import Learning, OutputKind, Pattern, Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.interrupts import INTERRUPTS
from maskplan.pipeline.data.dataset import Dataset
from maskplan.pipeline.learning.blocks import find_blocks
from maskplan.pipeline.learning.evaluate import fraction_changed
from maskplan.pipeline.learning.few_images import require_images
from maskplan.pipeline.learning.learner import Learner, NoGradientError
from maskplan.pipeline.learning.masked_net import Masks
from maskplan.pipeline.learning.options import LearnerFiles, LearnOptions, block_files
from maskplan.pipeline.learning.processes import join_processes
from maskplan.pipeline.learning.state import Progress, state_key
from maskplan.pipeline.models.state_dict import tensors_sha256

log = logging.getLogger(__name__)


def learn_masks(
    module: nn.Module,
    start: Mapping[str, npt.NDArray[np.bool_]],
    pattern: Pattern,
    preprocessing: Preprocessing,
    data: Dataset,
    options: LearnOptions,
    *,
    favor_start: bool = False,
    image_digests: tuple[str, ...] = (),
    files: LearnerFiles | None = None,
    device: str = "auto",
    kinds: Sequence[OutputKind] = (),
) -> tuple[Masks, Learning]:
    """Choose masks by gradient descent on gates over the patterns of each group.

    The start masks are the baseline: they are returned unless an epoch has a lower loss on `select`.
    During learning, BatchNorm uses batch statistics; for every evaluation it is recalibrated, as in the final network.

    Args:
        module: The dense model; neither its parameters nor its buffers change.
        start: Bool masks by weight name, each shaped like its weight.
        pattern: N:M.
        preprocessing: Preprocessing of the images.
        data: `train` for the gradients, `select` to choose the epoch.
        options: Schedules and seed.
        favor_start: The gates start `options.init_margin` above the magnitudes for the patterns of `start`. Not needed if
            `start` are the magnitude masks, which the initial gates prefer anyway.
        image_digests: Digests of the image sets, for the key of the learner's checkpoint.
        files: Files for checkpoint and metrics.
        device: `auto`, `cpu` or `cuda`.
        kinds: What the network returns; empty for a classifier. Labels are only read for a classifier.

    Returns:
        Masks by weight name, and a record of learning.

    Raises:
        InputError: The loss is not finite, there are fewer than two training images, or `distill` asks for labels that are
            not there.
        HostError: The disk is full; the last complete checkpoint is kept.
        KeyboardInterrupt: After SIGINT or SIGTERM; the state is saved first.
    """
    require_images(data)
    parts = {"train": data.train, "select": data.select}
    unlabeled = " and ".join(name for name, part in parts.items() if not (part.labels >= 0).all())
    if options.distill < 1 and (kinds or unlabeled):
        raise InputError(
            "without labels, masks can only be learned against the dense network",
            found=f"distill = {options.distill:g}, "
            + ("no classifier" if kinds else f"images without labels in {unlabeled}"),
            fix="set distill = 1 in the table [learn] of the recipe",
        )
    files = files or LearnerFiles()
    masks = {name: np.asarray(mask) for name, mask in start.items()}
    before = tensors_sha256(module.state_dict())
    # Of a copy: a forward pass may change buffers.
    blocks = find_blocks(copy.deepcopy(module), list(masks), preprocessing) if options.match_blocks else ()
    phases = _phases(options, files, has_blocks=bool(blocks))
    finished: list[Progress] = []
    # Hooks that change from step to step are not for compiled code.
    with join_processes(device) as process, INTERRUPTS.deferred(), torch.compiler.set_stance("force_eager"):
        for phase in phases:
            begin = finished[-1].best_masks if finished else masks
            learner = Learner(
                module,
                begin,
                pattern,
                preprocessing,
                data,
                phase.options,
                process,
                phase.files,
                kinds,
                favor_start=favor_start or bool(finished),
                blocks=blocks if phase.by_block else (),
            )
            try:
                key = state_key(phase.options, before, begin, (*image_digests, *map(str, kinds)))
                finished.append(learner.run(key))
            except NoGradientError:
                if not phase.by_block:
                    raise
                log.info("the blocks compute without gradients: none is learned by itself")
            del learner  # two networks, which the next phase does not need
    progress = finished[-1]
    if tensors_sha256(module.state_dict()) != before:
        raise AssertionError("learning masks changed a parameter or a buffer")
    return progress.best_masks, Learning(
        recipe="maskplan",
        epochs=sum(p.epochs for p in finished),
        steps=sum(p.steps for p in finished),
        images=len(data.train),
        seconds=round(60 * sum(p.minutes for p in finished), 3),
        groups_changed=fraction_changed(masks, progress.best_masks, pattern.m),
        select_divergence_start=finished[0].first.divergence,
        select_divergence_end=progress.best.divergence,
        select_top1_start=finished[0].first.top1,
        select_top1_end=progress.best.top1,
    )


@dataclass(frozen=True)
class _Phase:
    options: LearnOptions
    files: LearnerFiles
    by_block: bool = False


def _phases(options: LearnOptions, files: LearnerFiles, *, has_blocks: bool) -> tuple[_Phase, ...]:
    """The phases of learning, which share the epochs and the time; the first one has files of its own."""
    epochs = min(round(options.match_blocks * options.epochs), options.epochs - 1) if has_blocks else 0
    if epochs <= 0:
        return (_Phase(options, files),)
    budget = options.budget_minutes
    first, rest = (
        (None, None) if budget is None else (options.match_blocks * budget, (1 - options.match_blocks) * budget)
    )
    by_block = replace(options, epochs=epochs, judge_every=epochs, budget_minutes=first)
    return (
        _Phase(by_block, block_files(files), by_block=True),
        _Phase(replace(options, epochs=options.epochs - epochs, budget_minutes=rest), files),
    )
