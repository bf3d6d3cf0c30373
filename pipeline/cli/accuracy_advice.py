"""What to try when a network loses more accuracy than the gate allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from maskplan.pipeline.core.choices import FAIL, INT8, LAYERWISE, LEARNED, MAGNITUDE, TRANSPOSABLE
from maskplan.pipeline.learning.few_images import FEW_IMAGES

if TYPE_CHECKING:
    from maskplan.pipeline.report.record import RunReport


def accuracy_advice(report: RunReport) -> str | None:
    """The options that lose less accuracy and were not used, best first; None unless a threshold was missed."""
    missed = any(check.passed is False for check in report.parity.checks)
    if report.parity.verdict != FAIL or not missed:
        return None
    return f"try {'; '.join(_options(report))}"


def _options(report: RunReport) -> Iterator[str]:
    masks, recipe = report.masks, report.recipe
    if masks.method in (MAGNITUDE, LAYERWISE, TRANSPOSABLE):
        yield "--masks learned" if report.parity.images else "--data DIR, from which masks are learned"
    elif masks.learning is not None and masks.learning.images <= FEW_IMAGES:
        yield "more images"
    if masks.method in (LEARNED, MAGNITUDE, LAYERWISE) and not report.permutation and not report.permutation_reason:
        yield "--permute, which reorders channels so that masks keep more"
    if recipe.recalibrate.images == 0:
        yield "images in [recalibrate] of the recipe, for BatchNorm statistics"
    if report.precision == INT8:
        yield "--precision fp16"
    if recipe.mask.keep_dense_budget == 0:
        yield "keep_dense_budget = 5 in [mask] of the recipe, which leaves the costliest layers dense"
