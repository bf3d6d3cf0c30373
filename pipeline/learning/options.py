"""How masks are learned: one frozen record of options, with the defaults that we use ourselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.validation import above, at_least
from maskplan.pipeline.data.augmentation import require_augmentation


@dataclass(frozen=True)
class LearnerFiles:
    """Where the learner keeps what outlives it; None keeps nothing.

    Attributes:
        state: Its checkpoint.
        resume: Go on from a checkpoint of the same question.
        log: Folder of its metrics.
    """

    state: Path | None = None
    resume: bool = True
    log: Path | None = None


@dataclass(frozen=True)
class LearnOptions:
    """Options of the learner.

    Attributes:
        epochs: Passes over the training images.
        batch: Images a step.
        rate: Adam's learning rate for the gates, at its highest; it falls to zero along a cosine.
        tau_start: Temperature of the Gumbel-softmax at the first step.
        tau_end: And at the last; it falls geometrically.
        noise_start: Scale of the Gumbel noise at the first step: 1 samples by the softmax of the gates, 0 not at all.
        noise_end: And at the last; it falls in a straight line. Without noise, what is learned at the end is what will be
            deployed.
        hard: Forward through zeros and ones (straight-through); else through the soft sample.
        init_std: How strongly the gates start out for the magnitude mask: the standard deviation of a layer's gates.
        init_margin: How far the patterns of given masks (`--init`) start above the others.
        distill: Weight of the distillation from the dense network; the rest is cross-entropy with the labels.
        distill_temperature: Temperature of the distillation.
        norm_reward: Weight of a reward for the share of squared magnitude that the masks keep.
        ema: Decay of a running average of the gates, which then is what is judged; 0 judges the gates themselves.
        augment: `none`; `shift` moves images by up to an eighth of their size and repeats the edge, `crop` is black beyond
            it; `shift+flip` and `crop+flip` mirror them too. Best as the network itself was trained.
        judge_augment: The same for the statistics that masks are judged with: what `[recalibrate]` does, which sets it.
        patience: Stop after so many epochs without gain on `select`; 0 never does.
        save_every: Steps between two checkpoints of the learner; 0 saves at the end of epochs only.
        budget_minutes: Stop learning after this long; the schedule is shortened to fit. Not repeatable to the bit.
        seed: Of the noise and of the order of images.
    """

    RENAMED_FIELDS: ClassVar[Mapping[str, str]] = {
        "rate": "lr",
        "prior": "init_std",
        "lead": "init_margin",
        "softness": "distill_temperature",
    }

    epochs: int = 30
    batch: int = 64
    lr: float = 0.1
    tau_start: float = 1.0
    tau_end: float = 1.0
    noise_start: float = 0.3
    noise_end: float = 0.0
    hard: bool = True
    init_std: float = 3.0
    init_margin: float = 3.0
    distill: float = 1.0
    distill_temperature: float = 2.0
    norm_reward: float = 0.0
    ema: float = 0.0
    augment: str = "none"
    judge_augment: str = "none"
    patience: int = 0
    save_every: int = 500
    budget_minutes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(0, epochs=self.epochs, noise_start=self.noise_start, noise_end=self.noise_end)
        at_least(0, init_std=self.init_std, init_margin=self.init_margin)
        at_least(0, distill=self.distill, ema=self.ema)
        at_least(0, norm_reward=self.norm_reward, patience=self.patience, save_every=self.save_every, seed=self.seed)
        at_least(0, budget_minutes=self.budget_minutes)
        # BatchNorm needs two images for statistics.
        at_least(2, batch=self.batch)
        above(
            0, lr=self.lr, tau_start=self.tau_start, tau_end=self.tau_end, distill_temperature=self.distill_temperature
        )
        for name, value in (("distill", self.distill), ("ema", self.ema)):
            if value > 1:
                raise InputError(f"{name} is {value}", fix="give a number from 0 to 1")
        require_augmentation(self.augment)
        require_augmentation(self.judge_augment)
