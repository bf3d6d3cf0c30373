"""`maskplan compare`: the parity gate."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.compare_summary import show_parity
from maskplan.pipeline.cli.exit_codes import GateError
from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import image_options, override, parse_shape, write_report

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from maskplan.pipeline.core.artifacts import ImageSet, Preprocessing
    from maskplan.pipeline.core.reports import DepthReport, ParityReport
    from maskplan.pipeline.data.dataset import Split
    from maskplan.pipeline.parity.model_files import OpenedModel
    from maskplan.pipeline.parity.options import CompareOptions

_THRESHOLDS, _FOREIGN, _RESULTS, _WHERE = (
    options.THRESHOLDS,
    "ONNX files of other tools",
    "Results",
    "Where they differ",
)
_BISECT_IMAGES = 32

_EXAMPLES = """
maskplan compare build/r50/dense_engine.onnx build/r50/engine.onnx --data imagenet
maskplan compare dense.onnx sparse.onnx --max-top1-drop 0.5 --min-agreement 98 --use-ci
maskplan compare dense.onnx sparse.onnx --junit parity.xml --report parity.json --baseline released.json
maskplan compare dense.onnx sparse.onnx --bisect --plot depth.svg
maskplan compare detector.onnx sparse.onnx --data photos --min-sqnr 20 --use-ci
maskplan compare detector.onnx sparse.onnx --data val.npz --metric metrics.py:mean_ap --max-metric-drop 0.01
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    add_command(app, compare, _EXAMPLES, _defaults)


def _defaults() -> dict[str, object]:
    from maskplan.pipeline.parity.bisect import BisectOptions
    from maskplan.pipeline.parity.options import CompareOptions

    return {**vars(CompareOptions()), "bisect_tolerance": BisectOptions().tolerance}


def compare(
    dense: Annotated[
        Path,
        typer.Argument(help="The reference: an engine, an ONNX file or a checkpoint.", show_default=False),
    ],
    sparse: Annotated[Path, typer.Argument(help="Its replacement, of any of these kinds.", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with val/CLASS/*, or of images without labels, or a .npz file with an array for each input. "
            "digits_resnet has its own images."
        ),
    ] = None,
    max_top1_drop: options.MaxTop1Drop = None,
    max_top5_drop: Annotated[
        float | None,
        typer.Option(help="Percentage points of top-5 accuracy that may be lost.", rich_help_panel=_THRESHOLDS),
    ] = None,
    min_agreement: options.MinAgreement = None,
    max_flip_rate: Annotated[
        float | None,
        typer.Option(help="Percent of images whose predicted class may change.", rich_help_panel=_THRESHOLDS),
    ] = None,
    max_class_drop: Annotated[
        float | None,
        typer.Option(help="Percentage points of top-1 that any one class may lose.", rich_help_panel=_THRESHOLDS),
    ] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option(
            help="Smallest cosine similarity between outputs for one fixed image.", rich_help_panel=_THRESHOLDS
        ),
    ] = None,
    min_sqnr: options.MinSqnr = None,
    max_relative_error: Annotated[
        float | None,
        typer.Option(
            help="Largest relative error of any output; for networks that are not classifiers.",
            rich_help_panel=_THRESHOLDS,
        ),
    ] = None,
    metric: options.Metric = None,
    max_metric_drop: options.MaxMetricDrop = None,
    use_ci: options.UseCi = None,
    fixed_images: Annotated[
        int | None,
        typer.Option(help="Number of images on which raw outputs are compared.", rich_help_panel=_THRESHOLDS),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="TOML file whose table `compare` holds thresholds.", rich_help_panel=_THRESHOLDS),
    ] = None,
    outputs: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:KIND",
            help="What an output holds, where the guess is wrong: NAME:logits, NAME:logits:AXIS or NAME:values. Repeatable.",
            rich_help_panel=_FOREIGN,
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="CxHxW",
            help="Size of one image without the batch, where the model's own is dynamic.",
            rich_help_panel=_FOREIGN,
        ),
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Mean of each channel, such as 0.5,0.5,0.5.", rich_help_panel=_FOREIGN)
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="Standard deviation of each channel.", rich_help_panel=_FOREIGN)
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the result as JSON to this file.", rich_help_panel=_RESULTS)
    ] = None,
    junit: Annotated[
        Path | None,
        typer.Option(help="Write a JUnit XML file with one test case per threshold.", rich_help_panel=_RESULTS),
    ] = None,
    github: Annotated[
        bool | None,
        typer.Option(
            "--github/--no-github",
            help="Annotate the GitHub Actions job; by default if there is one.",
            rich_help_panel=_RESULTS,
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="Report of an earlier release: show what has changed since.", rich_help_panel=_RESULTS),
    ] = None,
    save_dense: Annotated[
        Path | None,
        typer.Option(help="Write DENSE's outputs as safetensors, for --dense-results.", rich_help_panel=_RESULTS),
    ] = None,
    dense_results: Annotated[
        Path | None,
        typer.Option(help="Use DENSE's saved outputs instead of running it.", rich_help_panel=_RESULTS),
    ] = None,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Find the first layer whose output differs.", rich_help_panel=_WHERE)
    ] = False,
    bisect_tolerance: Annotated[
        float | None,
        typer.Option(help="Relative difference above which a layer's output differs.", rich_help_panel=_WHERE),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="With --bisect: plot the difference by depth, as SVG.", rich_help_panel=_WHERE),
    ] = None,
    print_polygraphy: Annotated[
        bool,
        typer.Option(
            "--print-polygraphy",
            help="Print the equivalent Polygraphy command and compare nothing.",
            rich_help_panel=_WHERE,
        ),
    ] = False,
) -> None:
    """Decide whether SPARSE may replace DENSE. Exit code 1 if not, or if there is too little data to decide.

    On images without labels only the thresholds that need no labels are checked; give at least one of them.
    """
    from maskplan.pipeline.data.image_sets import identify, require_disjoint
    from maskplan.pipeline.parity.baseline import read_baseline, with_drift
    from maskplan.pipeline.parity.compare_networks import NetworkOptions, compare_networks, compares_outputs
    from maskplan.pipeline.parity.model_files import as_classifier, open_network, shared_preprocessing, val_images
    from maskplan.pipeline.parity.model_outputs import load_fixed_images

    if (bisect_tolerance is not None or plot is not None) and not bisect:
        raise typer.BadParameter("only with --bisect", param_hint="--bisect-tolerance or --plot")
    thresholds = override(
        _recipe_options(recipe),
        max_top1_drop=max_top1_drop,
        max_top5_drop=max_top5_drop,
        min_agreement=min_agreement,
        max_flip_rate=max_flip_rate,
        max_class_drop=max_class_drop,
        min_cosine=min_cosine,
        min_sqnr_db=min_sqnr,
        max_relative_error=max_relative_error,
        max_metric_drop=max_metric_drop,
        use_ci=use_ci,
        fixed_images=fixed_images,
    )
    if print_polygraphy and ".plan" in (dense.suffix, sparse.suffix):
        from maskplan.pipeline.parity.print_polygraphy import polygraphy_command

        # The sidecar of a plan tells its shape; the plan itself need not run on this host.
        print(polygraphy_command(dense, sparse, None))
        return
    earlier = read_baseline(baseline) if baseline is not None else None
    with contextlib.ExitStack() as stack:
        networks = [stack.enter_context(open_network(path)) for path in (dense, sparse)]
        network_options = NetworkOptions(data, tuple(outputs or ()), metric, image_options(shape, mean, std))
        if compares_outputs(networks, network_options, thresholds):
            _refuse_classifier_options(save_dense, dense_results, bisect, print_polygraphy)
            parity = compare_networks(networks[0], networks[1], network_options, thresholds)
            _publish(with_drift(parity, earlier) if earlier else parity, sparse, report, junit, github)
            return
        sides = [as_classifier(network) for network in networks]
        preprocessing = shared_preprocessing(sides, mean, std, parse_shape(shape), has_option=True)
        if print_polygraphy:
            from maskplan.pipeline.parity.print_polygraphy import polygraphy_command

            size = (preprocessing.channels, preprocessing.height, preprocessing.width)
            print(polygraphy_command(dense, sparse, size))
            return
        val = val_images(data, sides)
        image_set = identify(val) if val is not None else None
        if image_set is not None:
            require_disjoint(image_set, [s for side in sides if side.provenance for s in side.provenance.image_sets])
        parity = _compare(dense, sides, preprocessing, val, image_set, thresholds, save_dense, dense_results)
    if earlier is not None:
        parity = with_drift(parity, earlier)
    if bisect:
        images = load_fixed_images(preprocessing, val, min(_BISECT_IMAGES, thresholds.fixed_images))
        parity = _with_depth(parity, _bisect(dense, sparse, images, bisect_tolerance), plot)
    _publish(parity, sparse, report, junit, github)


def _refuse_classifier_options(*given: object) -> None:
    from maskplan.pipeline.core.errors import InputError

    names = ("--save-dense", "--dense-results", "--bisect", "--print-polygraphy")
    refused = [name for name, value in zip(names, given, strict=True) if value]
    if refused:
        fix = "remove it: the networks are compared output by output"
        raise InputError("only for classifiers of images", found=" and ".join(refused), fix=fix)


def _recipe_options(recipe: Path | None) -> CompareOptions:
    """The recipe's thresholds; without a recipe the defaults, without importing the other stages' options."""
    from maskplan.pipeline.parity.options import CompareOptions

    if recipe is None:
        return CompareOptions()
    from maskplan.pipeline.recipe import read_recipe

    return read_recipe(recipe, 0).compare


def _compare(
    dense: Path,
    sides: list[OpenedModel],
    preprocessing: Preprocessing,
    val: Split | None,
    image_set: ImageSet | None,
    thresholds: CompareOptions,
    save_dense: Path | None,
    dense_results: Path | None,
) -> ParityReport:
    """The verdict; the dense side is run, or its saved outputs are read."""
    from dataclasses import replace

    from maskplan.pipeline.core.files import sha256_of
    from maskplan.pipeline.parity.compare import compare as compare_models
    from maskplan.pipeline.parity.compare import require_comparable
    from maskplan.pipeline.parity.model_outputs import run_models
    from maskplan.pipeline.parity.saved_outputs import load_outputs, outputs_key, save_outputs

    reference, other = (side.classifier for side in sides)
    require_comparable(reference, other)
    outputs = None
    if dense_results is not None or save_dense is not None:
        key = outputs_key(sha256_of(dense), preprocessing, val, image_set, thresholds.fixed_images)
        if dense_results is not None:
            outputs = load_outputs(dense_results, key)
        else:
            (outputs,) = run_models({"dense": reference}, preprocessing, val, thresholds.fixed_images).values()
        if save_dense is not None:
            save_outputs(save_dense, key, outputs)
    provenances = [s.provenance for s in sides]
    parity = compare_models(reference, other, preprocessing, provenances, val, thresholds, dense_outputs=outputs)
    return replace(parity, images_sha256=image_set.sha256 if image_set is not None else None)


def _bisect(dense: Path, sparse: Path, images: npt.NDArray[np.float32], tolerance: float | None) -> DepthReport:
    from maskplan.pipeline.parity.bisect import BisectOptions
    from maskplan.pipeline.parity.bisect import bisect as bisect_models

    return bisect_models(dense, sparse, images, BisectOptions() if tolerance is None else BisectOptions(tolerance))


def _with_depth(parity: ParityReport, depth: DepthReport, plot: Path | None) -> ParityReport:
    from dataclasses import replace

    if plot is not None:
        from maskplan.pipeline.core.files import write_atomically
        from maskplan.pipeline.report.plots import error_by_depth

        write_atomically(plot, error_by_depth(depth).encode(), option="--plot")
    return replace(parity, depth=depth)


def _publish(parity: ParityReport, sparse: Path, report: Path | None, junit: Path | None, github: bool | None) -> None:
    """Write the files, print the result, annotate the CI job, and raise unless the gate passed."""
    from maskplan.pipeline.core.files import write_atomically
    from maskplan.pipeline.core.junit import parity_junit
    from maskplan.pipeline.core.serialization import encode

    write_report(report, encode(parity))
    if junit is not None:
        write_atomically(junit, parity_junit(parity, str(sparse)), option="--junit")
    show_parity(parity)
    if github if github is not None else os.environ.get("GITHUB_ACTIONS") == "true":
        from maskplan.pipeline.core.terminal import print_for_runner
        from maskplan.pipeline.parity.github_annotations import append_summary, summary, workflow_commands

        title = f"parity of {sparse.name}"
        print_for_runner(workflow_commands(parity, title))
        append_summary(summary(parity, title))
    if not parity.passed:
        raise GateError(parity.reason or "")
