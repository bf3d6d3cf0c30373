"""Thresholds and the verdicts that follow, at their edges, with and without confidence."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from scipy.stats import binomtest

from maskplan.pipeline.core.artifacts import Preprocessing, Provenance
from maskplan.pipeline.core.choices import FAIL, NOT_APPLICABLE, PASS
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.reports import Check, ClassDrop, Flips, ParityReport
from maskplan.pipeline.core.statistics import PairedCounts, drop_interval
from maskplan.pipeline.parity.options import CompareOptions
from maskplan.pipeline.parity.verdict import apply_thresholds

HOW = Preprocessing(3, 4, 4, 0, "nearest", (0.0,) * 3, (1.0,) * 3)
MADE = Provenance("net", True, "test", "0" * 64, 4, (), HOW)
UNTRAINED = replace(MADE, trained=False)

EMPTY = ParityReport(NOT_APPLICABLE, None, 0, None, None, None, None, None, None, None, 0.5, 0.99, 1.0)


def measured(both: int, lost: int, gained: int, neither: int, **changes: Any) -> ParityReport:
    """As if these had been counted; every other image of the same class, and top-5 as top-1."""
    counts = PairedCounts(both, lost, gained, neither)
    n, changed = counts.images, lost + gained
    interval = binomtest(changed, n).proportion_ci(0.95, "exact")
    found = replace(
        EMPTY,
        images=n,
        top1_dense=100 * (both + lost) / n,
        top5_dense=100 * (both + lost) / n,
        top1_drop=counts.drop,
        top5_drop=counts.drop,
        drop_ci95=drop_interval(counts),
        top5_drop_ci95=drop_interval(counts),
        agreement=100 * (n - changed) / n,
        flips=Flips(changed, lost, gained, 0),
        flip_rate=100 * changed / n,
        flip_rate_ci95=(100 * interval.low, 100 * interval.high),
        classes=(ClassDrop("cat", n - 10, 90, 89, 1), ClassDrop("dog", 10, 90, 70, 20)),
    )
    return replace(found, **changes)


def judged(found: ParityReport, *, finite: bool = True, made: Any = (None, None), **options: Any) -> ParityReport:
    return apply_thresholds(found, CompareOptions(**options), finite=finite, provenances=made)


def check_of(report: ParityReport, name: str) -> Check:
    (check,) = [c for c in report.checks if c.name == name]
    return check


THOUSAND = measured(850, 20, 10, 120)
LOW, HIGH = drop_interval(PairedCounts(850, 20, 10, 120))
FLIPS_HIGH = 100 * binomtest(30, 1000).proportion_ci(0.95, "exact").high
ROOM = {"max_top1_drop": 50.0}


@pytest.mark.parametrize(
    ("option", "edge", "worse"),
    [
        ("max_top1_drop", 1.0, -1e-9),
        ("max_top5_drop", 1.0, -1e-9),
        ("min_agreement", 97.0, 1e-9),
        ("max_flip_rate", 3.0, -1e-9),
        ("max_class_drop", 20.0, -1e-9),
        ("min_cosine", 0.99, 1e-9),
    ],
)
def test_each_threshold_is_where_it_is_said_to_be(option: str, edge: float, worse: float) -> None:
    at, beyond = (judged(THOUSAND, **{**ROOM, option: limit}) for limit in (edge, edge + worse))
    assert (at.verdict, at.reason, check_of(at, option).passed) == (PASS, None, True)
    assert (beyond.verdict, check_of(beyond, option).passed) == (FAIL, False)
    assert beyond.reason == check_of(beyond, option).message
    assert check_of(at, option).value == check_of(at, option).judged == pytest.approx(edge)


@pytest.mark.parametrize(
    ("option", "edge", "worse"),
    [
        ("max_top1_drop", HIGH, -1e-6),
        ("max_top5_drop", HIGH, -1e-6),
        ("min_agreement", 100 - FLIPS_HIGH, 1e-6),
        ("max_flip_rate", FLIPS_HIGH, -1e-6),
    ],
)
def test_with_confidence_the_bad_end_of_the_interval_decides(option: str, edge: float, worse: float) -> None:
    better = edge - math.copysign(1e-6, worse)
    at, beyond = (judged(THOUSAND, use_ci=True, **{**ROOM, option: limit}) for limit in (better, edge + worse))
    assert (at.verdict, beyond.verdict) == (PASS, FAIL)
    assert at.use_ci
    assert check_of(beyond, option).judged == pytest.approx(edge)
    assert "at worst" in str(beyond.reason)
    # The point is well within.
    assert judged(THOUSAND, **{**ROOM, option: edge + worse}).verdict == PASS


def test_every_failure_is_told_and_one_is_enough() -> None:
    report = judged(THOUSAND, max_top1_drop=0.5, max_top5_drop=0.5, min_agreement=99, max_class_drop=5, min_cosine=0.98)
    assert [c.passed for c in report.checks] == [False, False, False, False, True]
    assert report.reason == (
        "top-1 drops by 1.00 points; the limit is 0.5; top-5 drops by 1.00 points; the limit is 0.5;"
        " the models agree on 97.00% of images; the minimum is 99%;"
        " class dog drops by 20.00 points on 10 images; the limit is 5"
    )


def test_outputs_that_are_not_finite_fail_before_all_else() -> None:
    for found in (THOUSAND, EMPTY):
        for made in ((MADE, MADE), (MADE, UNTRAINED)):
            report = judged(found, finite=False, made=made, max_top1_drop=100)
            assert (report.verdict, report.reason) == (FAIL, "outputs are NaN or infinite")


def test_random_weights_are_not_judged() -> None:
    for made in ((UNTRAINED, MADE), (MADE, UNTRAINED), (None, UNTRAINED)):
        assert judged(THOUSAND, made=made, max_top1_drop=100).verdict == NOT_APPLICABLE
    assert judged(THOUSAND, made=(MADE, None)).verdict == PASS


def test_a_cosine_that_is_not_a_number_fails_its_threshold() -> None:
    assert judged(replace(THOUSAND, cosine_min=None), min_cosine=-1).verdict == FAIL


UNLABELED = replace(
    EMPTY, unlabeled_images=1000, agreement=99.0, flip_rate=1.0, flip_rate_ci95=(0.4, 1.8), flips=Flips(10, 0, 0, 0)
)


def test_without_labels_the_other_thresholds_decide_and_it_is_said() -> None:
    assert (judged(UNLABELED).verdict, judged(EMPTY).verdict) == (NOT_APPLICABLE, NOT_APPLICABLE)
    assert "no labeled images" in str(judged(UNLABELED).reason)
    for options, verdict in (
        ({"min_agreement": 99}, PASS),
        ({"min_agreement": 99.5}, FAIL),
        ({"max_flip_rate": 1.5, "use_ci": True}, FAIL),
        ({"min_cosine": 0.99}, PASS),
        ({"min_cosine": 0.995}, FAIL),
        ({"max_class_drop": 99}, NOT_APPLICABLE),
    ):
        report = judged(UNLABELED, **options)
        assert report.verdict == verdict
        assert check_of(report, "max_top1_drop").passed is None
        assert any("no labels" in note for note in report.notes)


def test_noise_can_fail_the_gate_and_not_pass_it() -> None:
    report = judged(EMPTY, min_agreement=50)
    assert (report.verdict, check_of(report, "min_agreement").passed) == (NOT_APPLICABLE, None)
    good, bad = judged(EMPTY, min_cosine=0.98), judged(EMPTY, min_cosine=0.995)
    assert (good.verdict, check_of(good, "min_cosine").passed) == (NOT_APPLICABLE, True)
    assert bad.verdict == FAIL


# Too few images.


def test_equal_models_on_too_few_images_fail_with_confidence_and_are_told_how_many_it_takes() -> None:
    few = measured(40, 0, 0, 6)
    report = judged(few, use_ci=True)
    check = check_of(report, "max_top1_drop")
    assert report.verdict == FAIL
    assert str(report.reason).startswith(
        "too few images to decide: with 46 images, top-1 of equal models could drop by"
    )
    needed = check.images_needed
    assert needed is not None
    assert f"at least {needed:,} are needed" in check.message
    # As many as that decide, a few less do not; the share of hits is the nearest that there is.
    for count, verdict in ((needed, PASS), (needed - 5, FAIL)):
        right = round(count * 40 / 46)
        assert judged(measured(right, 0, 0, count - right), use_ci=True).verdict == verdict


def test_a_model_that_gains_enough_passes_on_images_too_few_for_an_equal_one() -> None:
    report = judged(measured(30, 0, 14, 2), use_ci=True)
    assert (report.verdict, report.reason) == (PASS, None)
    assert judged(measured(44, 0, 0, 2), use_ci=True).verdict == FAIL


def test_enough_images_that_fail_are_not_called_too_few() -> None:
    check = check_of(judged(measured(8000, 150, 20, 1830), use_ci=True), "max_top1_drop")
    assert (check.passed, check.images_needed) == (False, None)
    assert "too few" not in check.message


@pytest.mark.parametrize(("option", "limit"), [("min_agreement", 99.0), ("max_flip_rate", 1.0)])
def test_the_images_that_no_flips_need_are_those_of_the_exact_interval(option: str, limit: float) -> None:
    check = check_of(judged(measured(90, 0, 0, 10), use_ci=True, max_top1_drop=50, **{option: limit}), option)
    # 1 - 0.025^(1/n) <= 1%.
    assert check.images_needed == math.ceil(math.log(0.025) / math.log(0.99)) == 368
    assert "at least 368 are needed" in check.message


def test_what_no_number_of_images_can_show_is_said() -> None:
    for options in ({"max_top1_drop": 0.0}, {"max_top1_drop": 50, "min_agreement": 100.0}):
        report = judged(measured(900, 0, 0, 100), use_ci=True, **options)
        assert report.verdict == FAIL
        assert "no number of images is enough" in str(report.reason)


def test_one_image_worth_more_than_the_threshold_is_noted_without_confidence() -> None:
    few = measured(40, 0, 0, 6)
    (note,) = judged(few).notes
    assert note.startswith("one of 46 images is 2.17 points, more than max_top1_drop")
    assert judged(few, max_top1_drop=2.2).notes == ()
    # Asking for equality is no mistake.
    assert judged(few, max_top1_drop=0, min_agreement=100).notes == ()


@pytest.mark.parametrize(
    "options",
    [{"min_agreement": 100.5}, {"min_cosine": 1.5}, {"max_flip_rate": -1}, {"max_class_drop": math.nan}],
)
def test_thresholds_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError):
        CompareOptions(**options)  # type: ignore[arg-type]
