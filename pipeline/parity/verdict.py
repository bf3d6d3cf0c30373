"""Apply the thresholds: each is compared with a measured number, or with the worse end of that number's interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from maskplan.pipeline.core.artifacts import Provenance
from maskplan.pipeline.core.choices import FAIL, NOT_APPLICABLE, PASS, GateVerdict
from maskplan.pipeline.core.reports import Check, ParityReport
from maskplan.pipeline.core.statistics import best_drop_limit, clopper_pearson, min_images

if TYPE_CHECKING:
    from maskplan.pipeline.parity.options import CompareOptions

_CONFIDENCE = 0.95


def apply_thresholds(
    measured: ParityReport, options: CompareOptions, *, finite: bool, provenances: Sequence[Provenance | None]
) -> ParityReport:
    """Add the checks, notes and verdict to a report.

    Outputs that are not finite always fail. With random weights the verdict is `not_applicable`. What cannot be judged
    never passes: without labels, the thresholds that need no labels decide, and at least one must be set. Without images,
    outputs on noise can fail but not pass.

    Args:
        measured: All measured numbers; its verdict is ignored.
        options: Thresholds.
        finite: Whether every output of both models is finite.
        provenances: Provenance of both, where known.
    """
    checks = _checks(measured, options)
    notes = (*measured.notes, *_notes(measured, options))
    verdict, reason = _verdict(measured, checks, finite, provenances)
    return replace(measured, verdict=verdict, reason=reason, checks=checks, notes=notes, use_ci=options.use_ci)


def _verdict(
    measured: ParityReport, checks: Sequence[Check], finite: bool, provenances: Sequence[Provenance | None]
) -> tuple[GateVerdict, str | None]:
    if not finite:
        return FAIL, "outputs are NaN or infinite"
    if any(p is not None and not p.trained for p in provenances):
        return NOT_APPLICABLE, "the weights are random: there is no accuracy to keep"
    problems = [c.message for c in checks if c.passed is False]
    if problems:
        return FAIL, "; ".join(problems)
    if not (measured.images or measured.unlabeled_images) or not any(c.passed for c in checks):
        return NOT_APPLICABLE, "no labeled images: give --data"
    return PASS, None


def _checks(found: ParityReport, options: CompareOptions) -> tuple[Check, ...]:
    checks = [_drop("top1", found, options.max_top1_drop, options.use_ci)]
    if options.max_top5_drop is not None:
        checks.append(_drop("top5", found, options.max_top5_drop, options.use_ci))
    if options.min_agreement is not None:
        checks.append(_agreement(found, options.min_agreement, options.use_ci))
    if options.max_flip_rate is not None:
        checks.append(_flip_rate(found, options.max_flip_rate, options.use_ci))
    if options.max_class_drop is not None:
        checks.append(_class_drop(found, options.max_class_drop))
    if options.min_cosine is not None:
        checks.append(_cosine(found, options.min_cosine))
    return tuple(checks)


def _drop(top: str, found: ParityReport, limit: float, use_ci: bool) -> Check:
    name, shown = f"max_{top}_drop", top.replace("top", "top-")
    value, interval, accuracy = (
        (found.top1_drop, found.drop_ci95, found.top1_dense)
        if top == "top1"
        else (found.top5_drop, found.top5_drop_ci95, found.top5_dense)
    )
    if value is None or interval is None or accuracy is None:
        return _unjudged(name, limit, "no labeled images")
    judged = interval[1] if use_ci else value
    message = f"{shown} drops by {value:.2f} points{_at_worst(judged, use_ci)}; the limit is {limit:g}"
    if not use_ci or judged <= limit:
        return Check(name, limit, value, judged, judged <= limit, message)
    share = accuracy / 100
    return _undecided(
        Check(name, limit, value, judged, False, message),
        found.images,
        lambda n: best_drop_limit(n, share) <= limit,
        f"with {found.images} images, {shown} of equal models could drop by {best_drop_limit(found.images, share):.2f}"
        f" points (95%); the limit is {limit:g}",
    )


def _agreement(found: ParityReport, limit: float, use_ci: bool) -> Check:
    if found.agreement is None or found.flip_rate_ci95 is None:
        return _unjudged("min_agreement", limit, "no images")
    value, judged = found.agreement, 100 - found.flip_rate_ci95[1] if use_ci else found.agreement
    message = f"the models agree on {value:.2f}% of images{_at_worst(judged, use_ci)}; the minimum is {limit:g}%"
    check = Check("min_agreement", limit, value, judged, judged >= limit, message)
    return _undecided_flips(check, found, 100 - limit) if use_ci and not check.passed else check


def _flip_rate(found: ParityReport, limit: float, use_ci: bool) -> Check:
    if found.flip_rate is None or found.flip_rate_ci95 is None:
        return _unjudged("max_flip_rate", limit, "no images")
    value, judged = found.flip_rate, found.flip_rate_ci95[1] if use_ci else found.flip_rate
    message = f"{value:.2f}% of top-1 predictions changed{_at_worst(judged, use_ci)}; the limit is {limit:g}%"
    check = Check("max_flip_rate", limit, value, judged, judged <= limit, message)
    return _undecided_flips(check, found, limit) if use_ci and not check.passed else check


def _class_drop(found: ParityReport, limit: float) -> Check:
    if not found.classes:
        return _unjudged("max_class_drop", limit, "no labeled images")
    worst = max(found.classes, key=lambda c: c.drop)
    over = sum(c.drop > limit for c in found.classes)
    others = f" ({over} such classes)" if over > 1 else ""
    message = (
        f"class {worst.name} drops by {worst.drop:.2f} points on {worst.images} images{others}; the limit is {limit:g}"
    )
    return Check("max_class_drop", limit, worst.drop, worst.drop, worst.drop <= limit, message)


def _cosine(found: ParityReport, limit: float) -> Check:
    if found.cosine_min is None:
        return Check("min_cosine", limit, None, None, False, "the outputs' cosine similarity is NaN")
    message = f"the outputs' smallest cosine similarity is {found.cosine_min:.6f}; the minimum is {limit:g}"
    return Check("min_cosine", limit, found.cosine_min, found.cosine_min, found.cosine_min >= limit, message)


def _at_worst(judged: float, use_ci: bool) -> str:
    return f", at worst {judged:.2f} (95%)" if use_ci else ""


def _unjudged(name: str, limit: float, reason: str) -> Check:
    return Check(name, limit, None, None, None, f"not judged: {reason}")


def _undecided_flips(check: Check, found: ParityReport, limit: float) -> Check:
    images = found.images + found.unlabeled_images

    def upper_limit(n: int) -> float:
        return 100 * clopper_pearson(0, n, _CONFIDENCE)[1]

    return _undecided(
        check,
        images,
        lambda n: upper_limit(n) <= limit,
        f"with {images} images, none of which changed, {upper_limit(images):.2f}% could (95%); the limit is {limit:g}%",
    )


def _undecided(check: Check, images: int, suffices: Callable[[int], bool], explanation: str) -> Check:
    """A failed check; if even identical models would fail it, its message says that there are too few images."""
    if suffices(images):
        return check
    needed = min_images(suffices)
    requirement = "no number of images is enough" if needed is None else f"at least {needed:,} are needed"
    return replace(check, message=f"too few images to decide: {explanation}; {requirement}", images_needed=needed)


def _notes(found: ParityReport, options: CompareOptions) -> tuple[str, ...]:
    notes = []
    if found.unlabeled_images:
        notes.append(
            f"{found.unlabeled_images} images have no labels: accuracy is not judged, only agreement and outputs"
        )
    if options.use_ci and options.max_class_drop is not None:
        notes.append("max_class_drop is compared with the drop itself: a class has too few images for an interval")
    images = found.images + found.unlabeled_images
    if images and not options.use_ci:
        limits = {
            "max_top1_drop": options.max_top1_drop,
            "max_top5_drop": options.max_top5_drop,
            "min_agreement": None if options.min_agreement is None else 100 - options.min_agreement,
            "max_flip_rate": options.max_flip_rate,
        }
        tight = [name for name, limit in limits.items() if limit is not None and 0 < limit < 100 / images]
        if tight:
            notes.append(
                f"one of {images} images is {100 / images:.2f} points, more than {' and '.join(tight)} allows:"
                " a single image decides the verdict"
            )
    return tuple(notes)
