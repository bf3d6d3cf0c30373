"""Options of mask learning, with their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.validation import above, at_least
from maskplan.pipeline.data.augmentation import require_augmentation


@dataclass(frozen=True)
class LearnerFiles:
    """Files that the learner writes; None writes nothing.

    Attributes:
        checkpoint: File of the learner's checkpoint.
        resume: Resume from the checkpoint if it was made with the same weights, images and options.
        log_dir: Folder of `learning.csv` and of TensorBoard's log.
    """

    checkpoint: Path | None = None
    resume: bool = True
    log_dir: Path | None = None


def block_files(files: LearnerFiles) -> LearnerFiles:
    """The files of the phase that matches block by block, next to those of the phase after it."""
    checkpoint, log_dir = files.checkpoint, files.log_dir
    return replace(
        files,
        checkpoint=checkpoint.with_name(f"{checkpoint.stem}-blocks{checkpoint.suffix}") if checkpoint else None,
        log_dir=log_dir / "blocks" if log_dir else None,
    )


@dataclass(frozen=True)
class LearnOptions:
    """Options of the learner.

    Attributes:
        epochs: Passes over the training images.
        batch: Images per step.
        lr: Adam's peak learning rate for the gates; it decays along a cosine to a hundredth.
        tau_start: Temperature of the Gumbel-softmax at the first step.
        tau_end: Temperature at the last step; it changes geometrically in between.
        noise_start: Scale of the Gumbel noise at the first step: 1 samples from the gates' softmax, 0 takes their argmax.
        noise_end: Scale at the last step; it changes linearly in between. At 0, the masks trained last are those deployed.
        hard: Forward pass with masks of zeros and ones (straight-through); otherwise with the soft sample.
        init_std: Standard deviation of a layer's initial gates, which follow the magnitudes: how strongly they prefer the
            magnitude mask.
        init_margin: Logit margin by which the patterns of given masks (`--init`) start above the others.
        distill: Weight of distillation from the dense network; cross-entropy with the labels gets the rest. Masks are chosen
            on `select` by the same sum.
        distill_temperature: Temperature of the distillation.
        match_features: Weight of the mean squared difference of the features inside from the dense network's
            (`features.py`); 0 matches the outputs only.
        match_blocks: Share of the epochs, at the beginning, in which each block is matched by itself (`blocks.py`); 0, or a
            network without blocks, has none.
        judge_every: Epochs between two evaluations on `select`; the last epoch always has one.
        norm_reward: Weight of a reward for the fraction of squared magnitude that the masks keep.
        ema: Decay of a moving average of the gates, which is evaluated instead of the gates; 0 evaluates the gates.
        augment: `none`; `shift` translates images by up to an eighth of their size and repeats the edge, `crop` fills with
            black instead; `shift+flip` and `crop+flip` also mirror. Best set as in the training of the network.
        judge_augment: Augmentation of the images that BatchNorm is recalibrated with when masks are evaluated; set from
            `[recalibrate]`.
        judge_relative: Whether that recalibration is relative to the dense network's; set from `[recalibrate]`.
        patience: Stop after this many epochs without gain on `select`; 0 never stops early.
        save_every: Steps between two checkpoints of the learner; 0 saves only at the end of epochs.
        budget_minutes: Stop learning after this long; the schedules shrink to fit. Results are then not bit-reproducible.
        seed: Seed of the noise and of the order of images.
    """

    RENAMED_FIELDS: ClassVar[Mapping[str, str]] = {
        "rate": "lr",
        "prior": "init_std",
        "lead": "init_margin",
        "softness": "distill_temperature",
    }

    epochs: int = 30
    batch: int = 64
    lr: float = 0.03
    tau_start: float = 1.0
    tau_end: float = 1.0
    noise_start: float = 0.3
    noise_end: float = 0.0
    hard: bool = True
    init_std: float = 3.0
    init_margin: float = 3.0
    distill: float = 1.0
    distill_temperature: float = 2.0
    match_features: float = 0.0
    match_blocks: float = 0.0
    judge_every: int = 1
    norm_reward: float = 0.0
    ema: float = 0.0
    augment: str = "none"
    judge_augment: str = "none"
    judge_relative: bool = True
    patience: int = 0
    save_every: int = 500
    budget_minutes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(0, epochs=self.epochs, noise_start=self.noise_start, noise_end=self.noise_end)
        at_least(0, init_std=self.init_std, init_margin=self.init_margin)
        at_least(0, distill=self.distill, ema=self.ema, match_features=self.match_features)
        at_least(0, match_blocks=self.match_blocks)
        at_least(1, judge_every=self.judge_every)
        at_least(0, norm_reward=self.norm_reward, patience=self.patience, save_every=self.save_every, seed=self.seed)
        at_least(0, budget_minutes=self.budget_minutes)
        # Batch statistics need at least two images.
        at_least(2, batch=self.batch)
        above(
            0, lr=self.lr, tau_start=self.tau_start, tau_end=self.tau_end, distill_temperature=self.distill_temperature
        )
        for name, value in (("distill", self.distill), ("ema", self.ema), ("match_blocks", self.match_blocks)):
            if value > 1:
                raise InputError(f"{name} is {value}", fix="give a number from 0 to 1")
        require_augmentation(self.augment)
        require_augmentation(self.judge_augment)
