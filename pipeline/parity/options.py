"""The thresholds of the parity gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.validation import at_least


@dataclass(frozen=True)
class CompareOptions:
    """What is compared, and what passes. A threshold that is None asks for nothing.

    Attributes:
        max_top1_drop: Points of top-1 that the sparse model may lose.
        max_top5_drop: Points of top-5.
        min_agreement: Percent of images on which the models must agree.
        max_flip_rate: Percent of images whose first choice may change: 100 minus agreement.
        max_class_drop: Points of top-1 that any class may lose.
        min_cosine: Smallest cosine similarity of one fixed image's outputs.
        use_ci: Hold the bad end of the 95% interval against the thresholds of drops, agreement and flips.
        fixed_images: Images on which the outputs themselves are compared.
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

    def __post_init__(self) -> None:
        at_least(-100, max_top1_drop=self.max_top1_drop, max_top5_drop=self.max_top5_drop)
        at_least(-100, max_class_drop=self.max_class_drop)
        at_least(0, min_agreement=self.min_agreement, max_flip_rate=self.max_flip_rate)
        at_least(-1, min_cosine=self.min_cosine)
        at_least(1, fixed_images=self.fixed_images)
        for name, value, most in (("min_agreement", self.min_agreement, 100), ("min_cosine", self.min_cosine, 1)):
            if value is not None and value > most:
                raise InputError(f"{name} is {value}", fix=f"give a number of at most {most}: nothing could pass")
