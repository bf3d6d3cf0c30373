"""Where a run stands among measured ones: its point, its interval, and the points of others."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from run_reports import FAILED, PARITY, UNTRAINED, full, report_of
from svg_plots import marks, words

from maskplan.pipeline.report.cost import Over, RunCost, accuracy_lost, measured_costs, run_cost
from maskplan.pipeline.report.html import render
from maskplan.pipeline.report.write import report_values

COST = RunCost(2.5, 1000, 0.75, (0.2, 1.3))


@pytest.fixture
def folder() -> Path:
    """A run's folder by name only: nothing is written."""
    return Path("build/net")


def test_the_cost_of_a_run_counts_all_images_and_the_minutes_of_learning(folder: Path) -> None:
    assert run_cost(full(folder)) == RunCost(1.5 / 60, 1000, 0.75, (0.2, 1.3))
    other = replace(full(folder), masks=replace(full(folder).masks, learning=None))
    assert run_cost(other) == RunCost(None, 1000, 0.75, (0.2, 1.3))


@pytest.mark.parametrize("parity", [UNTRAINED, replace(PARITY, top1_drop=None), replace(PARITY, drop_ci95=None)])
def test_a_run_without_a_comparison_of_accuracies_has_no_cost(parity: object, folder: Path) -> None:
    assert run_cost(replace(full(folder), parity=parity)) is None  # type: ignore[arg-type]


def test_masks_that_saw_no_image_have_no_cost(folder: Path) -> None:
    assert run_cost(report_of(folder)) is None


def test_synthetic_images_are_no_training_images(folder: Path) -> None:
    sets = tuple(replace(s, role=f"synthetic {s.role}") for s in full(folder).model.image_sets)
    assert run_cost(replace(full(folder), model=replace(full(folder).model, image_sets=sets))) is None


def test_a_failed_gate_still_has_a_cost(folder: Path) -> None:
    found = run_cost(replace(full(folder), parity=FAILED))
    assert found is not None
    assert found.drop == 12.5


@pytest.mark.parametrize(("over", "at"), [("images", 1000), ("minutes", 2.5)])
def test_the_run_stands_where_its_cost_and_drop_are(over: Over, at: float) -> None:
    svg = accuracy_lost(COST, over)
    ((x, y, tip),) = marks(svg, "run")
    assert tip == "this run: +0.75 points (0.20 to 1.30)"
    # The axes are read off the measured points, whose values are known: logarithmic across, linear up.
    learned = [m for m in measured_costs() if m.method == "learned"]
    places = marks(svg, "learned")
    assert [tip for _, _, tip in places] == [
        f"{m.network}, learned{', permuted' * m.permuted}: {m.drop:+.2f} points, {m.images:,} images, {m.minutes:.2g} min"
        for m in learned
    ]
    assert 0 < sum(m.permuted for m in learned) < len(learned)
    known = sorted((getattr(m, over), px, m.drop, py) for m, (px, py, _) in zip(learned, places, strict=True))
    (low, low_x, *_), (high, high_x, *_) = known[0], known[-1]
    assert low < high
    share = math.log(at / low) / math.log(high / low)
    assert x == pytest.approx(low_x + share * (high_x - low_x), abs=0.01)
    drops = sorted((drop, py) for _, _, drop, py in known)
    (least, bottom), (most, top) = drops[0], drops[-1]
    assert y == pytest.approx(bottom + (0.75 - least) / (most - least) * (top - bottom), abs=0.01)


def test_the_legend_names_the_methods_and_the_run() -> None:
    assert {"magnitude", "layerwise", "learned", "this run"} <= set(words(accuracy_lost(COST, "images")))


def test_a_run_without_minutes_is_drawn_over_images_only(folder: Path) -> None:
    layerwise = replace(full(folder), masks=replace(full(folder).masks, learning=None))
    page = render(layerwise, report_values(layerwise))
    assert "cost-images-title" in page
    assert "cost-minutes-title" not in page
    assert "cost-minutes-title" in render(full(folder), report_values(full(folder)))
    assert "cost-images-title" not in render(report_of(folder), report_values(report_of(folder)))
    with pytest.raises(ValueError, match="no minutes"):
        accuracy_lost(replace(COST, minutes=None), "minutes")


def test_no_minutes_at_all_can_be_drawn() -> None:
    ((x, _, _),) = marks(accuracy_lost(replace(COST, minutes=0.0), "minutes"), "run")
    assert math.isfinite(x)
