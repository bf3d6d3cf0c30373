"""How masks are learned: one frozen record of options, with the defaults that we use ourselves."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.bounds import above, at_least


@dataclass(frozen=True)
class LearnOptions:
    """Options of the learner.

    Attributes:
        epochs: Passes over the training images.
        batch: Images a step.
        rate: Adam's learning rate for the gates.
        tau_start: Temperature of the Gumbel-softmax at the first step.
        tau_end: And at the last; it falls geometrically.
        prior: How strongly the gates start out for the magnitude mask: the standard deviation of a layer's gates.
        softness: Temperature of the distillation from the dense network.
        budget_minutes: Stop learning after this long; the schedule is shortened to fit. Not repeatable to the bit.
        seed: Of the noise and of the order of images.
    """

    epochs: int = 30
    batch: int = 64
    rate: float = 0.05
    tau_start: float = 1.0
    tau_end: float = 0.1
    prior: float = 3.0
    softness: float = 2.0
    budget_minutes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(0, epochs=self.epochs, prior=self.prior, budget_minutes=self.budget_minutes, seed=self.seed)
        # BatchNorm needs two images for statistics.
        at_least(2, batch=self.batch)
        above(0, rate=self.rate, tau_start=self.tau_start, tau_end=self.tau_end, softness=self.softness)
