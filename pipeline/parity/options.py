"""The thresholds of the parity gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.validation import at_least


@dataclass(frozen=True)
class CompareOptions:
    """Options and thresholds of the comparison. A threshold that is None is not checked.

    Attributes:
        max_top1_drop: Largest allowed drop of top-1, in points.
        max_top5_drop: Largest allowed drop of top-5, in points.
        min_agreement: Smallest allowed agreement of the top-1 predictions, in percent of the images.
        max_flip_rate: Largest allowed share of changed top-1 predictions, in percent: 100 minus agreement.
        max_class_drop: Largest allowed drop of top-1 of any class, in points.
        min_cosine: Smallest allowed cosine similarity of one fixed image's outputs, -1 to 1.
        min_sqnr_db: Smallest allowed signal to noise ratio of any output of a network that is not a classifier, in dB.
        max_relative_error: Largest allowed relative error of any of its outputs.
        max_metric_drop: Largest allowed drop of the user's metric, in its unit.
        use_ci: Compare drops, agreement and flips with their thresholds by the worse end of the 95% interval.
        fixed_images: Number of images on which the outputs themselves are compared.
    """

    RENAMED_FIELDS: ClassVar[Mapping[str, str]] = {"confident": "use_ci"}

    max_top1_drop: float = 1.0
    min_agreement: float | None = None
    fixed_images: int = 256
    max_top5_drop: float | None = None
    max_flip_rate: float | None = None
    max_class_drop: float | None = None
    min_cosine: float | None = None
    use_ci: bool = False
    min_sqnr_db: float | None = None
    max_relative_error: float | None = None
    max_metric_drop: float | None = None

    def __post_init__(self) -> None:
        at_least(-100, max_top1_drop=self.max_top1_drop, max_top5_drop=self.max_top5_drop)
        at_least(-100, max_class_drop=self.max_class_drop)
        at_least(0, min_agreement=self.min_agreement, max_flip_rate=self.max_flip_rate)
        at_least(-1, min_cosine=self.min_cosine)
        at_least(0, max_relative_error=self.max_relative_error)
        at_least(1, fixed_images=self.fixed_images)
        for name, value, highest in (("min_agreement", self.min_agreement, 100), ("min_cosine", self.min_cosine, 1)):
            if value is not None and value > highest:
                raise InputError(f"{name} is {value}", fix=f"give at most {highest}: nothing can pass more")

    @property
    def limits_outputs(self) -> bool:
        """Whether a limit is given that classes cannot be judged by, so that outputs are compared."""
        limits = (self.min_sqnr_db, self.max_relative_error, self.max_metric_drop)
        return any(limit is not None for limit in limits)
