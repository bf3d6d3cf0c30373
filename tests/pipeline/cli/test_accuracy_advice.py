"""What `maskplan engine` suggests when a network loses too much accuracy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_reports import FAILED, full, report_of

from maskplan.pipeline.cli.accuracy_advice import accuracy_advice
from maskplan.pipeline.core.artifacts import Learning
from maskplan.pipeline.core.reports import Check
from maskplan.pipeline.recipe import Recipe

MISSED = Check("max_top1_drop", 1.0, 12.5, 12.5, False, "top-1 drops by 12.50 points; the limit is 1")
LOST = replace(FAILED, checks=(MISSED,))
FEW, MANY = (Learning("maskplan", 3, 30, images, 1.0, 0.1, 0.2, 0.1, None, None) for images in (1024, 45000))


@pytest.mark.parametrize(
    ("method", "learning", "changed", "options"),
    [
        ("magnitude", None, {}, ["--masks learned", "--permute", "keep_dense_budget"]),
        ("learned", FEW, {}, ["more images", "--permute", "keep_dense_budget"]),
        ("learned", MANY, {}, ["--permute", "keep_dense_budget"]),
        ("learned", MANY, {"precision": "int8"}, ["--permute", "--precision fp16", "keep_dense_budget"]),
        ("learned", MANY, {"permutation_reason": "no graph"}, ["keep_dense_budget"]),
        # Masks of a file are for one order of the channels.
        ("file masks.safetensors", None, {}, ["keep_dense_budget"]),
    ],
)
def test_options_that_were_not_used_are_suggested(
    method: str, learning: Learning | None, changed: dict[str, Any], options: list[str], tmp_path: Path
) -> None:
    report = report_of(tmp_path, parity=LOST, **changed)
    report = replace(report, masks=replace(report.masks, method=method, learning=learning))
    assert_suggests(accuracy_advice(report), options)


def test_what_was_used_is_not_suggested(tmp_path: Path) -> None:
    recipe = Recipe()
    recipe = replace(
        recipe, recalibrate=replace(recipe.recalibrate, images=0), mask=replace(recipe.mask, keep_dense_budget=5.0)
    )
    report = replace(full(tmp_path), parity=LOST, precision="fp32", recipe=recipe)
    assert report.permutation is not None
    report = replace(report, masks=replace(report.masks, method="learned", learning=MANY))
    assert_suggests(accuracy_advice(report), ["images in [recalibrate]"])


def test_masks_are_learned_from_images_that_have_to_be_given_first(tmp_path: Path) -> None:
    report = report_of(tmp_path, parity=replace(LOST, images=0))
    advice = accuracy_advice(replace(report, masks=replace(report.masks, method="magnitude")))
    assert_suggests(advice, ["--data DIR", "--permute", "keep_dense_budget"])


def test_nothing_is_suggested_where_no_threshold_was_missed(tmp_path: Path) -> None:
    """Outputs that are NaN have other causes."""
    assert accuracy_advice(report_of(tmp_path)) is None
    assert accuracy_advice(report_of(tmp_path, parity=replace(FAILED, checks=()))) is None


def assert_suggests(advice: str | None, options: list[str]) -> None:
    assert advice is not None
    found = advice.removeprefix("try ").split("; ")
    assert len(found) == len(options)
    assert all(given.startswith(option) for given, option in zip(found, options, strict=True))
