"""report.html: one file that needs no network, for screens light and dark, wide and narrow, and for paper."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from maskplan.engines.evidence import totals
from maskplan.engines.ort import PLANS_DID_NOT_RUN
from maskplan.pipeline.core.artifacts import LayerSparsity
from maskplan.pipeline.core.choices import CONFORMING, CONVERSIONS, DENSE, GPU_BACKENDS, SPARSE, UNKNOWN
from maskplan.pipeline.core.reports import BatchTiming, LayerDifference, ParityReport, WeightVerdict
from maskplan.pipeline.core.serialization import encode
from maskplan.pipeline.data.synthetic import synthetic_count
from maskplan.pipeline.permutation.record import AS_GIVEN, FIXED, MOVED, UNREAD
from maskplan.pipeline.recipe import Recipe
from maskplan.pipeline.report import cost, plots
from maskplan.pipeline.report.record import RunReport

FASTER, SLOWER, NO_DIFFERENCE = "faster", "slower", "no difference"

# Text for reason codes; other codes are shown with spaces instead of underscores.
_REASONS = {
    "grouped": "grouped convolution",
    "channels_not_multiple_of_4": "input channels are not a multiple of {m}",
    "not_constant": "its weight is not a constant",
    "unsupported_op": "no sparse kernels for this operator",
    "dtype": "no sparse kernels for this data type",
    "stem": "first convolution, left dense by choice",
    "linear": "linear layer, left dense by choice",
    "fewer_channels_than_asked": "fewer input channels than requested",
    "not_named": "not among the requested layers",
    "costs_too_much_accuracy": "its mask costs too much accuracy",
    "weight_is_computed": "the network computes its weight from a parameter, which makes the zeros of a mask dense",
    "output_channels_not_in_tiles": "output channels are not a multiple of {m}",
    "ran_dense": "ran dense, so its dense weights were restored",
    "not_2to4": "not 2:4",
    "no_documented_fp32_kernels": "no sparse kernels are documented for FP32",
    "optimization_level_below_3": "the builder optimization level is below 3: it tries few kernels",
    "quantized_input_float_output": "quantized input, float output: move the Q/DQ nodes",
    "likely_few_channels": "likely too few channels for a gain",
}

_STATES = {MOVED: "moved", AS_GIVEN: "left as they were", UNREAD: "left, as no masked layer reads them", FIXED: "fixed"}

# Sorts a table by the column whose header is clicked; initially tables are in the order of the network.
_SORT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const key = (row, column) => row.cells[column].dataset.key ?? row.cells[column].textContent.trim();
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const rows = [...body.rows].sort((one, two) => {
        const a = key(one, column), b = key(two, column);
        if (a === "" || b === "") return (a === "") - (b === "");
        return sign * (isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", { numeric: true }) : a - b);
      });
      body.append(...rows);
    });
  });
}
"""


@dataclass(frozen=True)
class LayerRow:
    """One row of the table of layers.

    Attributes:
        weight: A weight of the engine's ONNX file, with its verdict.
        why: Why it is sparse or dense.
        kept: Share of its magnitude that its mask keeps, 0 to 1; None, as the next two, without a mask.
        best: The maximum that the pattern allows.
        changed: Percent of groups that differ from the magnitude mask; None also if they were not counted.
        differs: Difference of its output in percent of the dense output's norm; None if it was not measured.
        ran: `sparse`, `dense` or `unknown`; empty if the engine reports no layers.
    """

    weight: WeightVerdict
    why: str
    kept: float | None
    best: float | None
    changed: float | None
    differs: float | None
    ran: str


def render(report: RunReport, values: dict[str, Any]) -> str:
    """Fill the page with a report; `values` is its JSON form."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(ms=_ms, rate=_rate, signed=_signed)
    template = environment.from_string(
        resources.files("maskplan.pipeline.report").joinpath("template.html.j2").read_text("utf-8")
    )
    return template.render(
        report=report,
        values=values,
        headline=headline(report),
        layers=layer_rows(report),
        plots=_plots(report),
        gain=gain,
        conversions=CONVERSIONS,
        sparse_kernels=report.ran_on in GPU_BACKENDS,
        plans_did_not_run=PLANS_DID_NOT_RUN if report.stand_in is not None else "",
        largest_differences=largest_differences(report),
        groups_by_state=_groups_by_state(report),
        synthetic=synthetic_count(report.model.image_sets),
        changed_options=changed_options(report.recipe),
        options=dict(_flat(encode(report.recipe))),
        script=_SORT,
        script_sha256=base64.b64encode(hashlib.sha256(_SORT.encode()).digest()).decode(),
    )


def headline(report: RunReport) -> tuple[str, str]:
    """The summary's color (`good`, `bad`, `neutral`) and sentence."""
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
    if parity.by_output:
        return "good", f"The sparse engine's outputs are within the limits ({_limits_kept(parity)}); {conforming}."
    assert parity.top1_drop is not None
    change = f"loses {parity.top1_drop:.2f} points" if parity.top1_drop > 0 else f"gains {-parity.top1_drop:.2f} points"
    subject = "engine" if report.stand_in is None else "model, run by ONNX Runtime,"
    change = "keeps" if parity.top1_drop == 0 else change + " of"
    return "good", (
        f"The sparse {subject} {change} top-1 ({parity.top1_dense:.2f}% dense, {parity.top1_sparse:.2f}% sparse,"
        f" {parity.images} images); {conforming}."
    )


def _limits_kept(parity: ParityReport) -> str:
    return "; ".join(check.message for check in parity.checks if check.passed)


def gain(timed: BatchTiming) -> str:
    """Whether the sparse engine is faster than the dense one by more than measurements vary."""
    low, high = timed.ratio_ci95
    noise = timed.build_spread or 0.0
    if low > 1 and timed.speedup - 1 > noise:
        return FASTER
    return SLOWER if high < 1 and 1 - timed.speedup > noise else NO_DIFFERENCE


def layer_rows(report: RunReport) -> list[LayerRow]:
    """One row for each weight of the engine's ONNX file, in file order: conformance, kept magnitude, and what ran."""
    masked = {m.name: m for m in report.masks.masked}
    reasons = {d.name: d.reason for d in report.masks.dense}
    statistics = report.mask_statistics
    changed = {layer.name: layer.found.changed_percent for layer in statistics.layers} if statistics else {}
    differs = {d.node: d.relative for d in report.depth.layers} if report.depth else {}
    ran: dict[str, list[LayerSparsity]] = {}
    for layer in report.engine.layers:
        for node in layer.nodes or (layer.name,):
            ran.setdefault(node, []).append(layer)
    rows = []
    for weight in report.conformance.weights:
        mask = masked.get(weight.name)
        relative = differs.get(weight.node)
        state, dense_because = _layer_state(ran.get(weight.node, ()))
        why = weight.reason or reasons.get(weight.name, "") or dense_because
        rows.append(
            LayerRow(
                weight=weight,
                why=_reason_text(why, report.masks.pattern.m) if why else _masked_why(weight, state, bool(ran)),
                kept=mask.kept if mask else None,
                best=mask.kept_best if mask else None,
                changed=changed.get(weight.name),
                differs=100 * relative if relative is not None else None,
                ran=state if ran else "",
            )
        )
    return rows


def largest_differences(report: RunReport, max_layers: int = 5) -> list[LayerDifference]:
    """The layers whose outputs differ most; outputs that are not finite come first."""
    if report.depth is None:
        return []
    return sorted(report.depth.layers, key=lambda d: (d.relative is not None, -(d.relative or 0.0)))[:max_layers]


def changed_options(recipe: Recipe) -> list[tuple[str, str]]:
    """Options that differ from their defaults, as `table.option` and value."""
    usual = dict(_flat(encode(Recipe())))
    return [(name, value) for name, value in _flat(encode(recipe)) if usual.get(name) != value]


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in table.items():
        # `[mask]` holds a copy of `[learn]`.
        if f"{prefix}{name}" == "mask.learn":
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value, ensure_ascii=False)


def _plots(report: RunReport) -> dict[str, str | None]:
    timed = report.timing if report.timing.batches else None
    statistics, spent = report.mask_statistics, cost.run_cost(report)
    return {
        "accuracy": plots.accuracy(report.parity.methods) if report.parity.methods else None,
        "classes": plots.class_drops(report.parity.classes) if any(c.drop > 0 for c in report.parity.classes) else None,
        "images": cost.accuracy_lost(spent, "images") if spent else None,
        "minutes": cost.accuracy_lost(spent, "minutes") if spent and spent.minutes is not None else None,
        "depth": plots.error_by_depth(report.depth) if report.depth and report.depth.layers else None,
        "latency": plots.latency(timed) if timed else None,
        "throughput": plots.throughput(timed) if timed else None,
        "kept": plots.kept_magnitude(report.masks) if report.masks.masked else None,
        "patterns": plots.pattern_histogram(statistics.total) if statistics and statistics.total.groups else None,
    }


def _layer_state(layers: Sequence[LayerSparsity]) -> tuple[str, str]:
    """The state of a node in all layers that name it, as `totals` has it for a layer's profiles, and why if it is dense."""
    counted = totals(layers)
    if counted.sparse:
        return SPARSE, ""
    if counted.unknown or not counted.dense:
        return UNKNOWN, ""
    return DENSE, next((layer.reason for layer in layers if layer.reason), "")


def _masked_why(weight: WeightVerdict, state: str, has_evidence: bool) -> str:
    """Why a weight without a reason against sparsity is sparse or dense."""
    if weight.verdict != CONFORMING:
        return weight.hint or ""
    if not has_evidence:
        return "masked"
    return {
        SPARSE: "a sparse kernel was chosen",
        DENSE: "probably timed as faster",
    }.get(state, "its kernel is not named")


def _reason_text(code: str, m: int) -> str:
    return _REASONS[code].format(m=m) if code in _REASONS else code.replace("_", " ")


def _groups_by_state(report: RunReport) -> list[tuple[str, str, int, int]]:
    """Groups of channels by outcome and reason: number of groups and of channels."""
    if report.permutation is None:
        return []
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for found in sorted(report.permutation.permutation.groups, key=lambda g: list(_STATES).index(g.state)):
        key = _STATES[found.state], found.reason or ""
        groups, channels = counts.get(key, (0, 0))
        counts[key] = groups + 1, channels + found.channels
    return [(*key, *count) for key, count in counts.items()]


def _ms(value: float) -> str:
    """Milliseconds with about three digits that mean something, and no exponent."""
    decimals = 4 if value < 0.1 else 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{decimals}f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _signed(value: float, decimals: int = 2) -> str:
    """A number with its sign, a proper minus; zero has none."""
    text = f"{value:+.{decimals}f}"
    return text[1:] if not float(text) else text.replace("-", "\N{MINUS SIGN}")
