"""report.html: one file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from engines.evidence import DENSE, SPARSE, UNKNOWN, totals
from pipeline import plots
from pipeline.artifacts import LayerSparsity
from pipeline.report import RunReport


def render(report: RunReport, values: dict[str, Any]) -> str:
    """Fill the page with a report; `values` is its JSON form."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("pipeline").joinpath("report.html.j2").read_text("utf-8"))
    return template.render(
        report=report,
        values=values,
        headline=headline(report),
        layers=layer_rows(report),
        accuracy=plots.accuracy(report.parity.methods) if report.parity.methods else None,
        latency=plots.latency(report.timing) if report.timing.batches else None,
        kept=plots.kept_magnitude(report.masks),
    )


def headline(report: RunReport) -> tuple[str, str]:
    """The summary's colour (`good`, `bad`, `neutral`) and sentence."""
    parity, conformance = report.parity, report.conformance
    conforming = f"all {conformance.conforming} masked weights are {conformance.pattern}"
    if not conformance.passed:
        return "bad", f"Not deployable: {conformance.reason}."
    if parity.verdict == "not_applicable":
        return (
            "neutral",
            f"{conforming[0].upper()}{conforming[1:]}; accuracy was not judged: {parity.reason}.",
        )
    if parity.verdict == "fail":
        return "bad", f"{conforming[0].upper()}{conforming[1:]}, but accuracy is not kept: {parity.reason}."
    assert parity.top1_drop is not None
    change = f"loses {parity.top1_drop:.2f} points" if parity.top1_drop > 0 else f"gains {-parity.top1_drop:.2f} points"
    change = "keeps" if parity.top1_drop == 0 else change + " of"
    return "good", (
        f"The sparse engine {change} top-1 ({parity.top1_dense:.2f}% dense, {parity.top1_sparse:.2f}% sparse,"
        f" {parity.images} images); {conforming}."
    )


def _ran(layers: Sequence[LayerSparsity]) -> str:
    """The state of a node in all layers that name it, as `totals` has it for a layer's profiles, and why if it is dense."""
    counted = totals(layers)
    if counted.sparse:
        return SPARSE
    if counted.unknown or not counted.dense:
        return UNKNOWN
    why = next((layer.reason for layer in layers if layer.reason), None)
    return f"{DENSE}: {why.replace('_', ' ')}" if why else DENSE


def layer_rows(report: RunReport) -> list[dict[str, Any]]:
    """One row a weight of the engine's ONNX file: conformance, and how much its mask keeps."""
    masked = {m.name: m for m in report.masks.masked}
    reasons = {d.name: d.reason for d in report.masks.dense}
    ran: dict[str, list[LayerSparsity]] = {}
    for layer in report.engine.layers:
        for node in layer.nodes or (layer.name,):
            ran.setdefault(node, []).append(layer)
    rows = []
    for weight in report.conformance.weights:
        mask = masked.get(weight.name)
        rows.append(
            {
                "weight": weight,
                "why": weight.reason or reasons.get(weight.name, ""),
                "kept": mask.kept if mask else None,
                "best": mask.kept_best if mask else None,
                "ran": _ran(ran.get(weight.node, ())) if ran else "",
            }
        )
    return rows
