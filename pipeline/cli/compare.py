"""`compare`: the parity gate."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli.gates import GateError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from maskplan.pipeline.core.artifacts import ImageSet, Preprocessing
    from maskplan.pipeline.core.reports import DepthReport
    from maskplan.pipeline.data.dataset import Split
    from maskplan.pipeline.parity.options import CompareOptions
    from maskplan.pipeline.parity.sides import Side
from maskplan.pipeline.core.reports import ParityReport

_THRESHOLDS, _FOREIGN, _RESULTS, _WHERE = "Thresholds", "Foreign ONNX files", "Results", "Where they differ"
_BISECT_IMAGES = 32

_EXAMPLES = """Examples:\n
  maskplan compare build/r50/dense_engine.onnx build/r50/engine.onnx --data imagenet\n
  maskplan compare dense.onnx sparse.onnx --max-top1-drop 0.5 --min-agreement 98 --use-ci\n
  maskplan compare dense.onnx sparse.onnx --junit parity.xml --report parity.json --baseline released.json\n
  maskplan compare dense.onnx sparse.onnx --bisect --plot depth.svg
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(epilog=_EXAMPLES)(compare)


def compare(
    dense: Annotated[
        Path,
        typer.Argument(help="The reference: an engine, an ONNX file or a checkpoint.", show_default=False),
    ],
    sparse: Annotated[Path, typer.Argument(help="What shall replace it.", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with val/CLASS/*, or of images without classes; digits_resnet has its own images."),
    ] = None,
    max_top1_drop: Annotated[
        float | None,
        typer.Option(help="Points of top-1 that may be lost; 1.0 by default.", rich_help_panel=_THRESHOLDS),
    ] = None,
    max_top5_drop: Annotated[
        float | None, typer.Option(help="Points of top-5 that may be lost.", rich_help_panel=_THRESHOLDS)
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Percent of images on which both must agree.", rich_help_panel=_THRESHOLDS)
    ] = None,
    max_flip_rate: Annotated[
        float | None,
        typer.Option(help="Percent of images whose first choice may change.", rich_help_panel=_THRESHOLDS),
    ] = None,
    max_class_drop: Annotated[
        float | None, typer.Option(help="Points of top-1 that any class may lose.", rich_help_panel=_THRESHOLDS)
    ] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option(help="Smallest cosine similarity of one fixed image's outputs.", rich_help_panel=_THRESHOLDS),
    ] = None,
    use_ci: Annotated[
        bool | None,
        typer.Option(
            "--use-ci/--use-point",
            help="Judge the bad end of the 95% interval, or the measured number.",
            rich_help_panel=_THRESHOLDS,
        ),
    ] = None,
    fixed_images: Annotated[
        int | None,
        typer.Option(help="Images on which outputs are compared; 256 by default.", rich_help_panel=_THRESHOLDS),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="TOML file whose compare table holds thresholds.", rich_help_panel=_THRESHOLDS),
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Mean a channel, such as 0.5,0.5,0.5.", rich_help_panel=_FOREIGN)
    ] = None,
    std: Annotated[str | None, typer.Option(help="Deviation a channel.", rich_help_panel=_FOREIGN)] = None,
    report: Annotated[Path | None, typer.Option(help="Write the verdict as JSON.", rich_help_panel=_RESULTS)] = None,
    junit: Annotated[
        Path | None,
        typer.Option(help="Write a JUnit XML file, a test case for each threshold.", rich_help_panel=_RESULTS),
    ] = None,
    github: Annotated[
        bool | None,
        typer.Option(
            "--github/--no-github",
            help="Annotate the GitHub Actions job; by default where there is one.",
            rich_help_panel=_RESULTS,
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="A report of an earlier release: show what has changed.", rich_help_panel=_RESULTS),
    ] = None,
    save_dense: Annotated[
        Path | None,
        typer.Option(help="Write what DENSE answers, as safetensors, for --dense-results.", rich_help_panel=_RESULTS),
    ] = None,
    dense_results: Annotated[
        Path | None,
        typer.Option(help="Take what DENSE answered before instead of running it.", rich_help_panel=_RESULTS),
    ] = None,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Find the first layer that departs.", rich_help_panel=_WHERE)
    ] = False,
    bisect_tolerance: Annotated[
        float | None,
        typer.Option(help="Relative difference of a layer's output beyond which it departs.", rich_help_panel=_WHERE),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="With --bisect: write the difference by depth as SVG.", rich_help_panel=_WHERE),
    ] = None,
    print_polygraphy: Annotated[
        bool,
        typer.Option(
            "--print-polygraphy",
            help="Print the like command of Polygraphy, and compare nothing.",
            rich_help_panel=_WHERE,
        ),
    ] = False,
) -> None:
    """Say whether SPARSE may replace DENSE. Exit code 1 if not, or if it cannot be told.

    On images without labels the thresholds that need none decide, if any is given; by default none is.
    """
    from maskplan.pipeline.data.dataset import identify, require_disjoint
    from maskplan.pipeline.parity.answers import fixed_images as images_of
    from maskplan.pipeline.parity.drift import read_baseline, with_drift
    from maskplan.pipeline.parity.sides import open_side, shared_preprocessing

    if bisect_tolerance is not None or plot is not None:
        _require_bisect(bisect)
    chosen = _options(
        recipe,
        max_top1_drop=max_top1_drop,
        max_top5_drop=max_top5_drop,
        min_agreement=min_agreement,
        max_flip_rate=max_flip_rate,
        max_class_drop=max_class_drop,
        min_cosine=min_cosine,
        use_ci=use_ci,
        fixed_images=fixed_images,
    )
    earlier = read_baseline(baseline) if baseline is not None else None
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(open_side(path)) for path in (dense, sparse)]
        how = shared_preprocessing(sides, mean, std)
        if print_polygraphy:
            from maskplan.pipeline.parity.print_polygraphy import polygraphy_command

            print(polygraphy_command(dense, sparse, (how.channels, how.height, how.width)))
            return
        val = _images(data, sides)
        image_set = identify(val) if val is not None else None
        if image_set is not None:
            require_disjoint(image_set, [s for side in sides if side.provenance for s in side.provenance.image_sets])
        verdict = _gate(dense, sides, how, val, image_set, chosen, save_dense, dense_results)
    if earlier is not None:
        verdict = with_drift(verdict, earlier)
    if bisect:
        found = _bisect(dense, sparse, images_of(how, val, min(_BISECT_IMAGES, chosen.fixed_images)), bisect_tolerance)
        verdict = _with_depth(verdict, found, plot)
    _tell(verdict, f"parity of {sparse.name}", sparse, report, junit, github)
    if not verdict.passed:
        raise GateError(verdict.reason or "")


def _options(recipe: Path | None, **given: float | bool | None) -> CompareOptions:
    """The recipe's thresholds, and in their place those of the command line."""
    from dataclasses import replace

    from maskplan.pipeline.parity.options import CompareOptions

    chosen = CompareOptions()
    if recipe is not None:
        from maskplan.pipeline.recipe import read_recipe

        chosen = read_recipe(recipe, 0).compare
    changes: dict[str, object] = {name: value for name, value in given.items() if value is not None}
    return replace(chosen, **changes)  # type: ignore[arg-type]


def _images(data: Path | None, sides: list[Side]) -> Split | None:
    """The folder's images, labeled or not; the bundled model's own digits; or none."""
    from maskplan.pipeline.data.dataset import open_val
    from maskplan.pipeline.data.digits import load_digits
    from maskplan.pipeline.models.registry import BUNDLED
    from maskplan.pipeline.parity.unlabeled import open_unlabeled

    known = next((s.provenance for s in reversed(sides) if s.provenance), None)
    if data is not None:
        return open_unlabeled(data) or open_val(data, known.labels if known else (), sides[0].classes)
    if known is not None and known.model == BUNDLED and sides[0].classes == 10:
        return load_digits().val
    return None


def _gate(
    dense: Path,
    sides: list[Side],
    preprocessing: Preprocessing,
    val: Split | None,
    image_set: ImageSet | None,
    chosen: CompareOptions,
    save_dense: Path | None,
    dense_results: Path | None,
) -> ParityReport:
    """The verdict; the dense side is run, or what it answered before is read."""
    from dataclasses import replace

    from maskplan.pipeline.core.files import sha256_of
    from maskplan.pipeline.parity.answers import ask
    from maskplan.pipeline.parity.compare import compare as compare_stage
    from maskplan.pipeline.parity.compare import require_comparable
    from maskplan.pipeline.parity.saved_answers import load_answers, question, save_answers

    reference, other = (side.classifier for side in sides)
    require_comparable(reference, other)
    said = None
    if dense_results is not None or save_dense is not None:
        asked = question(sha256_of(dense), preprocessing, val, image_set, chosen.fixed_images)
        if dense_results is not None:
            said = load_answers(dense_results, asked)
        else:
            (said,) = ask({"dense": reference}, preprocessing, val, chosen.fixed_images).values()
        if save_dense is not None:
            save_answers(save_dense, asked, said)
    provenances = [s.provenance for s in sides]
    verdict = compare_stage(reference, other, preprocessing, provenances, val, chosen, dense_answers=said)
    return replace(verdict, images_sha256=image_set.sha256 if image_set is not None else None)


def _require_bisect(bisect: bool) -> None:
    if not bisect:
        raise typer.BadParameter("it goes with --bisect", param_hint="--bisect-tolerance or --plot")


def _bisect(dense: Path, sparse: Path, images: npt.NDArray[np.float32], tolerance: float | None) -> DepthReport:
    from maskplan.pipeline.parity.bisect import BisectOptions
    from maskplan.pipeline.parity.bisect import bisect as bisect_stage

    return bisect_stage(dense, sparse, images, BisectOptions() if tolerance is None else BisectOptions(tolerance))


def _with_depth(verdict: ParityReport, found: DepthReport, plot: Path | None) -> ParityReport:
    from dataclasses import replace

    if plot is not None:
        from maskplan.pipeline.core.files import write_atomically
        from maskplan.pipeline.report.plots import error_by_depth

        write_atomically(plot, error_by_depth(found).encode())
    return replace(verdict, depth=found)


def _tell(
    verdict: ParityReport,
    title: str,
    sparse: Path,
    report: Path | None,
    junit: Path | None,
    github: bool | None,
) -> None:
    """Write the files, print the verdict, and annotate the job."""
    from maskplan.pipeline.core.files import write_atomically, write_json
    from maskplan.pipeline.core.junit import parity_junit
    from maskplan.pipeline.core.serialization import encode

    if report is not None:
        write_json(report, encode(verdict))
    if junit is not None:
        write_atomically(junit, parity_junit(verdict, str(sparse)))
    _show(verdict)
    if github if github is not None else os.environ.get("GITHUB_ACTIONS") == "true":
        from maskplan.pipeline.parity.github import append_summary, summary, workflow_commands

        print("\n".join(workflow_commands(verdict, title)))
        append_summary(summary(verdict, title))


def _show(report: ParityReport) -> None:
    if report.images:
        assert report.drop_ci95 is not None
        assert report.top5_drop_ci95 is not None
        print(f"images         {report.images}")
        print(f"top-1 %        {report.top1_dense:.2f} dense, {report.top1_sparse:.2f} sparse")
        print(f"drop, points   {report.top1_drop:+.2f} ({report.drop_ci95[0]:.2f} to {report.drop_ci95[1]:.2f}, 95%)")
        low, high = report.top5_drop_ci95
        print(f"top-5 %        {report.top5_dense:.2f} dense, {report.top5_sparse:.2f} sparse")
        print(f"drop, points   {report.top5_drop:+.2f} ({low:.2f} to {high:.2f}, 95%)")
    if report.flips is not None and report.flip_rate_ci95 is not None:
        flips, (low, high) = report.flips, report.flip_rate_ci95
        print(f"agreement %    {report.agreement:.2f}")
        print(f"flips          {flips.changed}, {report.flip_rate:.2f}% ({low:.2f} to {high:.2f}, 95%)")
        if report.images:
            print(
                f"               {flips.right_to_wrong} right to wrong, {flips.wrong_to_right} wrong to right,"
                f" {flips.wrong_to_wrong} wrong to wrong; McNemar's p {report.mcnemar_p:.3g}"
            )
    worst = sorted((c for c in report.classes if c.drop > 0), key=lambda c: -c.drop)[:3]
    if worst:
        print("worst classes  " + ", ".join(f"{c.name} {c.drop:+.2f} of {c.images} images" for c in worst))
    if report.max_abs_diff is not None:
        print(f"largest difference of outputs {report.max_abs_diff:.3g}, smallest cosine {_number(report.cosine_min)}")
    for output in report.outputs:
        print(
            f"{output.name}: over {output.images} fixed images, absolute differences {_number(output.median_abs)} median,"
            f" {_number(output.p99_abs)} 99%; relative {_number(output.median_rel)}, {_number(output.p99_rel)};"
            f" smallest PSNR {_number(output.psnr_min_db)} dB"
        )
    for row in report.drift:
        change = "" if row.change is None else f" ({row.change:+.4g})"
        print(f"since baseline {row.name} {_number(row.before)} -> {_number(row.now)}{change}")
    if report.depth is not None:
        first = next((d for d in report.depth.layers if d.node == report.depth.first), None)
        told = "none departs" if first is None else f"{first.node} ({first.op}), by {_number(first.relative)}"
        print(f"first layer that departs by more than {report.depth.tolerance:g}: {told}")
    print(f"{report.verdict.replace('_', ' ')}{': ' + report.reason if report.reason else ''}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"
