"""What `maskplan compare` prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from maskplan.pipeline.core.terminal import print_line

if TYPE_CHECKING:
    from maskplan.pipeline.core.output_reports import OutputParity
    from maskplan.pipeline.core.reports import ParityReport


def show_parity(report: ParityReport) -> None:
    """Print the numbers of a comparison, and the verdict as the last line."""
    for part in (_accuracy, _flips, _classes, _outputs, _networks, _metric, _drift, _depth):
        for line in part(report):
            print_line(line)
    print_line(f"{report.verdict.replace('_', ' ')}{': ' + report.reason if report.reason else ''}")


def _accuracy(report: ParityReport) -> Iterator[str]:
    if not report.images:
        return
    assert report.drop_ci95 is not None
    assert report.top5_drop_ci95 is not None
    yield f"images         {report.images}"
    yield f"top-1 %        {report.top1_dense:.2f} dense, {report.top1_sparse:.2f} sparse"
    yield f"drop, points   {report.top1_drop:+.2f} ({report.drop_ci95[0]:.2f} to {report.drop_ci95[1]:.2f}, 95%)"
    low, high = report.top5_drop_ci95
    yield f"top-5 %        {report.top5_dense:.2f} dense, {report.top5_sparse:.2f} sparse"
    yield f"drop, points   {report.top5_drop:+.2f} ({low:.2f} to {high:.2f}, 95%)"


def _flips(report: ParityReport) -> Iterator[str]:
    if report.flips is None or report.flip_rate_ci95 is None:
        return
    flips, (low, high) = report.flips, report.flip_rate_ci95
    yield f"agreement %    {report.agreement:.2f}"
    yield f"flips          {flips.changed}, {report.flip_rate:.2f}% ({low:.2f} to {high:.2f}, 95%)"
    if report.images:
        yield (
            f"               {flips.right_to_wrong} right to wrong, {flips.wrong_to_right} wrong to right,"
            f" {flips.wrong_to_wrong} wrong to wrong; McNemar's p {report.mcnemar_p:.3g}"
        )


def _classes(report: ParityReport) -> Iterator[str]:
    worst = sorted((c for c in report.classes if c.drop > 0), key=lambda c: -c.drop)[:3]
    if worst:
        yield "worst classes  " + ", ".join(f"{c.name} {c.drop:+.2f} of {c.images} images" for c in worst)


def _outputs(report: ParityReport) -> Iterator[str]:
    if report.max_abs_diff is not None and not report.by_output:
        yield (f"largest difference of outputs {report.max_abs_diff:.3g}, smallest cosine {_number(report.cosine_min)}")
    for output in report.outputs:
        yield (
            f"{output.name}: over {output.images} fixed images, absolute differences {_number(output.median_abs)} median,"
            f" {_number(output.p99_abs)} 99%; relative {_number(output.median_rel)}, {_number(output.p99_rel)};"
            f" smallest PSNR {_number(output.psnr_min_db)} dB"
        )


def _networks(report: ParityReport) -> Iterator[str]:
    for output in report.by_output:
        yield (
            f"{output.name}: {output.kind}, {output.samples} samples, SQNR {_decibels(output)},"
            f" relative error {_number(output.relative_error)}{_interval(output.relative_error_ci95)},"
            f" smallest cosine {_number(output.cosine_min)}, largest difference {_number(output.max_abs_diff)}"
        )
        if output.agreement is not None:
            yield f"  same class in {output.agreement:.2f}%{_interval(output.agreement_ci95)} of its places"
        if output.unmatched:
            yield f"  {output.unmatched} samples have another size in the sparse model and are not compared"


def _metric(report: ParityReport) -> Iterator[str]:
    found = report.metric
    if found is not None:
        yield (
            f"{found.name}: {found.dense:.5g} dense, {found.sparse:.5g} sparse on {found.samples} samples;"
            f" drop {found.drop:+.4g}{_interval(found.drop_ci95)}"
        )


def _decibels(output: OutputParity) -> str:
    if output.relative_error == 0:
        return "infinite, all values are equal"
    shown = "-" if output.sqnr_db is None else f"{output.sqnr_db:.2f} dB"
    return shown + _interval(output.sqnr_ci95_db)


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.4g} to {interval[1]:.4g}, 95%)"


def _drift(report: ParityReport) -> Iterator[str]:
    for row in report.drift:
        change = "" if row.change is None else f" ({row.change:+.4g})"
        yield f"since baseline {row.name} {_number(row.before)} -> {_number(row.now)}{change}"


def _depth(report: ParityReport) -> Iterator[str]:
    if report.depth is None:
        return
    first = next((d for d in report.depth.layers if d.node == report.depth.first), None)
    layer = "none" if first is None else f"{first.node} ({first.op}), by {_number(first.relative)}"
    yield f"first layer that differs by more than {report.depth.tolerance:g}: {layer}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"
