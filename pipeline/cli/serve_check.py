"""`maskplan serve-check`: does a running Triton server serve what was deployed?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.exit_codes import GateError
from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import override, parse_batch_sizes, write_report

if TYPE_CHECKING:
    from maskplan.pipeline.triton.deployed import Deployed
    from maskplan.pipeline.triton.serve_latency import LoadOptions
    from maskplan.pipeline.triton.serve_report import ServeReport

_LATENCY, _GATE, _RESULTS = "Latency", "Gate on images", "Results"

_EXAMPLES = """
maskplan serve-check --url localhost:8000 --repository models --model resnet50
maskplan serve-check --url gpu-host:8000 --repository models/resnet50/2/golden --no-latency
maskplan serve-check --url localhost:8000 --repository models --against dense.onnx --data imagenet --min-agreement 98
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    add_command(app, serve_check, _EXAMPLES, _defaults, name="serve-check")


def _defaults() -> dict[str, object]:
    from maskplan.pipeline.parity.options import CompareOptions
    from maskplan.pipeline.triton.serve_check import ServeCheckOptions
    from maskplan.pipeline.triton.serve_latency import LoadOptions

    load = LoadOptions()
    shown = {"concurrency": load.concurrency, "window": load.window_s, "timeout": ServeCheckOptions().timeout_s}
    return {**shown, "max_top1_drop": CompareOptions().max_top1_drop}


def serve_check(
    url: Annotated[str, typer.Option(help="HTTP port of the server: HOST:PORT, or https://HOST:PORT.")],
    repository: Annotated[
        Path | None,
        typer.Option(
            help="What was deployed: the model repository, a model's folder in it, or a golden folder or file."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of the model; by default the only one in --repository.")
    ] = None,
    version: Annotated[int | None, typer.Option(min=1, help="Version; by default the newest that is served.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Allowed share of the largest golden value; by default the one stored with it."),
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds to wait for a response.")] = None,
    latency: Annotated[
        bool, typer.Option("--latency/--no-latency", help="Measure latency.", rich_help_panel=_LATENCY)
    ] = True,
    batch: Annotated[
        str | None,
        typer.Option(
            help="Images in a request, separated by commas; by default 1 and the preferred batch.",
            rich_help_panel=_LATENCY,
        ),
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Requests in flight, separated by commas.", rich_help_panel=_LATENCY)
    ] = None,
    window: Annotated[
        float | None,
        typer.Option(
            help="Seconds of a window; three that agree within 10% end a measurement.", rich_help_panel=_LATENCY
        ),
    ] = None,
    max_p99_ms: Annotated[
        float | None,
        typer.Option(help="Largest allowed 99th percentile under any of these loads.", rich_help_panel=_LATENCY),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Compare with this engine, ONNX file or checkpoint; with --data by default the deployed engine.",
            rich_help_panel=_GATE,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with val/CLASS/*, or of images without labels.", rich_help_panel=_GATE),
    ] = None,
    max_top1_drop: options.MaxTop1Drop = None,
    min_agreement: options.MinAgreement = None,
    use_ci: options.UseCi = None,
    mean: options.Mean = None,
    std: options.Std = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the result as JSON to this file.", rich_help_panel=_RESULTS)
    ] = None,
    junit: Annotated[
        Path | None,
        typer.Option(help="Write a JUnit XML file with one test case per check.", rich_help_panel=_RESULTS),
    ] = None,
) -> None:
    """Ask a running Triton server whether what it serves is what was deployed. Exit code 1 if not.

    Versions, inputs and outputs are compared with the repository, outputs with the golden ones. With --data or --against,
    the gate of `compare` judges the served model on images.
    """
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.core.files import write_atomically
    from maskplan.pipeline.core.junit import checks_junit
    from maskplan.pipeline.core.serialization import encode
    from maskplan.pipeline.parity.options import CompareOptions
    from maskplan.pipeline.triton.client import TritonClient, parse_address
    from maskplan.pipeline.triton.deployed import find_deployed
    from maskplan.pipeline.triton.serve_check import ServeCheckOptions, check_served, find_served
    from maskplan.pipeline.triton.served_parity import GateOptions, served_parity

    loads = _loads(batch, concurrency, window) if latency else None
    given = override(ServeCheckOptions(loads=loads), tolerance=tolerance, max_p99_ms=max_p99_ms, timeout_s=timeout)
    thresholds = override(CompareOptions(), max_top1_drop=max_top1_drop, min_agreement=min_agreement, use_ci=use_ci)
    address = parse_address(url)
    deployed = find_deployed(repository, model, version) if repository is not None else None
    name = model or (deployed.model if deployed is not None else None)
    if name is None:
        raise InputError("no model to check", fix="give --model, or --repository with what was deployed")
    reference = _reference(against, data, deployed)
    with TritonClient(address, given.timeout_s) as client:
        served, checked = find_served(client, name, version, deployed)
        parity = None
        if reference is not None:
            gate = GateOptions(reference, data, mean, std, thresholds)
            parity = served_parity(client, served, checked, deployed.engine if deployed is not None else None, gate)
        result = check_served(client, served, checked, deployed, given, parity)
    write_report(report, encode(result))
    if junit is not None:
        checks = (*result.checks, *(parity.checks if parity is not None else ()))
        text = checks_junit(f"{result.model} of {result.url}", checks, result.verdict, result.reason)
        write_atomically(junit, text, option="--junit")
    _show(result)
    if not result.passed:
        raise GateError(result.reason or "")


def _loads(batch: str | None, concurrency: str | None, window: float | None) -> LoadOptions:
    from maskplan.pipeline.triton.serve_latency import LoadOptions

    return override(
        LoadOptions(),
        batches=parse_batch_sizes(batch),
        concurrency=parse_batch_sizes(concurrency, "--concurrency 1,4"),
        window_s=window,
    )


def _reference(against: Path | None, data: Path | None, deployed: Deployed | None) -> Path | None:
    """The model file that the served one is compared with on images; None if nothing asks for it."""
    from maskplan.pipeline.core.errors import InputError

    if against is not None or data is None:
        return against
    if deployed is None or deployed.engine is None:
        raise InputError(
            "no model to compare the served one with",
            where=data,
            fix="give --against MODEL, or a --repository with one engine in the version",
        )
    return deployed.engine


def _show(report: ServeReport) -> None:
    from maskplan.pipeline.cli.compare_summary import show_parity
    from maskplan.pipeline.core.terminal import print_line

    versions = ", ".join(map(str, report.versions))
    print_line(f"{report.server} at {report.url}: {report.model} version {report.version}, {report.platform}")
    print_line(f"versions       {versions} served")
    for load in report.latency:
        print_line(
            f"latency        batch {load.batch}, {load.concurrency} in flight: {load.p50_ms:.3g} ms median,"
            f" {load.p90_ms:.3g} 90%, {load.p99_ms:.3g} 99%; {load.images_per_s:.4g} images/s"
            f"{'' if load.stable else f', not stable after {load.windows} windows'}"
        )
    for check in report.checks:
        state = "not judged" if check.passed is None else "pass" if check.passed else "FAIL"
        print_line(f"{check.name:<14} {state}: {check.message}")
    for note in report.notes:
        print_line(f"note: {note}")
    if report.parity is not None:
        show_parity(report.parity)
    print_line(f"{report.verdict.replace('_', ' ')}{': ' + report.reason if report.reason else ''}")
