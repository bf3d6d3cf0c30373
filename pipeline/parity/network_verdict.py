"""The parity gate of networks that are not classifiers: limits on each output, and on the user's metric."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from maskplan.pipeline.core.artifacts import Provenance
from maskplan.pipeline.core.choices import FAIL, NOT_APPLICABLE, PASS, GateVerdict
from maskplan.pipeline.core.output_reports import MetricParity, OutputParity
from maskplan.pipeline.core.reports import Check, ParityReport
from maskplan.pipeline.parity.by_output import NetworkComparison
from maskplan.pipeline.parity.options import CompareOptions

_LOG = logging.getLogger(__name__)

TOP1 = "top-1 %"
"""Name of the metric that is measured where images are labeled and the network has one output of logits."""


@dataclass(frozen=True)
class _Limit:
    """A limit on a number of each output; `sign` is 1 where larger numbers are worse."""

    option: str
    limit: float
    sign: int
    what: str
    value: Callable[[OutputParity], float | None]
    interval: Callable[[OutputParity], tuple[float, float] | None]


def network_report(
    compared: NetworkComparison,
    metric: MetricParity | None,
    samples: int,
    provenances: Sequence[Provenance | None],
    options: CompareOptions,
    *,
    is_noise: bool = False,
) -> ParityReport:
    """Judge a comparison.

    Outputs that are not finite fail. Without a limit on outputs or metric, and for random weights, the verdict is
    `not_applicable`. Noise in place of data can fail but not pass.

    Args:
        compared: The measured differences.
        metric: The metric, if there is one.
        samples: How many there were.
        provenances: Provenance of both, where known.
        options: The limits.
        is_noise: The samples are noise.
    """
    checks = _checks(compared.outputs, metric, options)
    verdict, reason = _verdict(compared, checks, provenances, is_noise=is_noise)
    notes = [
        f"{o.unmatched} of {samples} samples have another size of {o.name!r} in the sparse model and are not compared:"
        " give --metric FILE.py:FUNCTION to judge them"
        for o in compared.outputs
        if o.unmatched
    ]
    if is_noise:
        notes.append("the outputs were compared on noise: give --data")
    for note in notes:
        _LOG.warning(note)
    agreements = [o.agreement for o in compared.outputs if o.agreement is not None]
    differences = [o.max_abs_diff for o in compared.outputs if o.max_abs_diff is not None]
    cosines = [o.cosine_min for o in compared.outputs if o.cosine_min is not None]
    return ParityReport(
        verdict=verdict,
        reason=reason,
        images=0,
        top1_dense=None,
        top5_dense=None,
        top1_sparse=None,
        top5_sparse=None,
        top1_drop=None,
        drop_ci95=None,
        agreement=min(agreements, default=None),
        max_abs_diff=max(differences, default=None),
        cosine_min=min(cosines, default=None),
        max_top1_drop=options.max_top1_drop,
        unlabeled_images=0 if is_noise else samples,
        checks=checks,
        use_ci=options.use_ci,
        notes=tuple(notes),
        by_output=compared.outputs,
        metric=metric,
    )


def _verdict(
    compared: NetworkComparison, checks: Sequence[Check], provenances: Sequence[Provenance | None], *, is_noise: bool
) -> tuple[GateVerdict, str | None]:
    if not compared.finite:
        return FAIL, "outputs are NaN or infinite where the other model's are not"
    if any(p is not None and not p.trained for p in provenances):
        return NOT_APPLICABLE, "the weights are random: there is no accuracy to keep"
    problems = [c.message for c in checks if c.passed is False]
    if problems:
        return FAIL, "; ".join(problems)
    if is_noise:
        return NOT_APPLICABLE, "no data: give --data"
    if not any(c.passed for c in checks):
        return NOT_APPLICABLE, (
            "no limit on the outputs: give --min-sqnr, --max-relative-error, --min-agreement, --min-cosine, or --metric with"
            " --max-metric-drop"
        )
    return PASS, None


def _checks(outputs: Sequence[OutputParity], metric: MetricParity | None, options: CompareOptions) -> tuple[Check, ...]:
    checks = [_worst_output(limit, outputs, options.use_ci) for limit in _limits(options)]
    if metric is not None and metric.name == TOP1:
        checks.append(_metric("max_top1_drop", metric, options.max_top1_drop, options.use_ci))
    elif options.max_metric_drop is not None:
        checks.append(_metric("max_metric_drop", metric, options.max_metric_drop, options.use_ci))
    of_classes = {name: getattr(options, name) for name in ("max_top5_drop", "max_flip_rate", "max_class_drop")}
    reason = "not judged: the networks are compared output by output"
    checks += [Check(name, limit, None, None, None, reason) for name, limit in of_classes.items() if limit is not None]
    return tuple(checks)


def _limits(options: CompareOptions) -> list[_Limit]:
    def none(_: OutputParity) -> None:
        return None

    limits = (
        ("min_sqnr", options.min_sqnr_db, -1, "SQNR in dB", _sqnr, lambda o: o.sqnr_ci95_db),
        (
            "max_relative_error",
            options.max_relative_error,
            1,
            "relative error",
            lambda o: o.relative_error,
            lambda o: o.relative_error_ci95,
        ),
        (
            "min_agreement",
            options.min_agreement,
            -1,
            "agreement in %",
            lambda o: o.agreement,
            lambda o: o.agreement_ci95,
        ),
        ("min_cosine", options.min_cosine, -1, "smallest cosine similarity", lambda o: o.cosine_min, none),
    )
    return [_Limit(name, limit, *rest) for name, limit, *rest in limits if limit is not None]  # type: ignore[arg-type]


def _sqnr(output: OutputParity) -> float | None:
    """Infinite where all values are equal."""
    return float("inf") if output.relative_error == 0 else output.sqnr_db


def _worst_output(limit: _Limit, outputs: Sequence[OutputParity], use_ci: bool) -> Check:
    """The check of the output that is furthest on the wrong side."""
    if limit.option == "min_agreement":
        outputs = [o for o in outputs if o.agreement is not None]
    if not outputs:
        return Check(limit.option, limit.limit, None, None, None, "not judged: no output holds logits")
    unknown = [(o.name, "it") for o in outputs if limit.value(o) is None]
    if use_ci and limit.option != "min_cosine":
        # Equal outputs have no interval in dB, and need none.
        unknown += [(o.name, "its interval") for o in outputs if o.relative_error != 0 and limit.interval(o) is None]
    if unknown:
        name, what = unknown[0]
        message = f"{name}: {limit.what}: {what} cannot be measured"
        return Check(limit.option, limit.limit, None, None, False, message)

    def judged(output: OutputParity) -> float:
        value, interval = limit.value(output), limit.interval(output) if use_ci else None
        assert value is not None
        return value if interval is None else interval[1 if limit.sign > 0 else 0]

    worst = max(outputs, key=lambda o: limit.sign * judged(o))
    value, number = limit.value(worst), judged(worst)
    assert value is not None
    at_worst = f", at worst {number:.4g} (95%)" if use_ci and limit.interval(worst) is not None else ""
    word = "limit" if limit.sign > 0 else "minimum"
    message = f"{worst.name}: {limit.what} is {value:.4g}{at_worst}; the {word} is {limit.limit:g}"
    return Check(limit.option, limit.limit, value, number, limit.sign * (number - limit.limit) <= 0, message)


def _metric(option: str, metric: MetricParity | None, limit: float, use_ci: bool) -> Check:
    if metric is None:
        return Check(option, limit, None, None, None, "not judged: give --metric FILE.py:FUNCTION")
    if use_ci and metric.drop_ci95 is None:
        message = f"{metric.name} drops by {metric.drop:.4g}; its interval cannot be measured"
        return Check(option, limit, metric.drop, None, False, message)
    judged = metric.drop_ci95[1] if use_ci and metric.drop_ci95 is not None else metric.drop
    at_worst = f", at worst {judged:.4g} (95%)" if use_ci else ""
    message = f"{metric.name} drops by {metric.drop:.4g}{at_worst}; the limit is {limit:g}"
    return Check(option, limit, metric.drop, judged, judged <= limit, message)
