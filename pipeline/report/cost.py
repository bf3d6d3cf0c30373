"""What masks cost against what they need: where a run stands among measured ones, as SVG text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from maskplan.pipeline.core.choices import LAYERWISE, LEARNED, MAGNITUDE
from maskplan.pipeline.core.serialization import decode
from maskplan.pipeline.data.synthetic import synthetic_count
from maskplan.pipeline.report.drawing import OWN, PLAIN, add_legend, new_axes, to_svg
from maskplan.pipeline.report.record import RunReport

Over = Literal["minutes", "images"]
"""What a plot of the cost has along its horizontal axis."""

_MARKERS = {MAGNITUDE: "o", LAYERWISE: "s", LEARNED: "D"}
LEAST_MINUTES = 0.05
"""What took less is drawn here: a logarithmic axis shows no zero."""


@dataclass(frozen=True)
class MeasuredCost:
    """Points of top-1 that masks of one network and method lose, and what choosing them took.

    Attributes:
        network: Of `benchmarks/accuracy`, trained on CIFAR-10.
        images: Training images that masks and BatchNorm statistics saw.
        minutes: On the machine of the benchmark.
        permuted: Whether the channels were permuted first.
    """

    network: str
    method: str
    images: int
    minutes: float
    drop: float
    drop_ci95: tuple[float, float]
    permuted: bool = False


@dataclass(frozen=True)
class RunCost:
    """What a run's masks cost: `minutes` of learning, None for other methods; `images` that masks and statistics saw."""

    minutes: float | None
    images: int
    drop: float
    drop_ci95: tuple[float, float]


@cache
def measured_costs() -> tuple[MeasuredCost, ...]:
    """The accuracy benchmarks' runs, as `benchmarks/accuracy/cost_plot.py` wrote them."""
    text = resources.files("maskplan.pipeline.report").joinpath("measured_costs.json").read_text("utf-8")
    return tuple(decode(MeasuredCost, run) for run in json.loads(text))


def run_cost(report: RunReport) -> RunCost | None:
    """The cost of a run; None without a comparison of accuracies, and for masks that saw no image or synthetic ones."""
    parity, sets = report.parity, report.model.image_sets
    images = sum(s.images for s in sets)
    if parity.top1_drop is None or parity.drop_ci95 is None or not images or synthetic_count(sets):
        return None
    learning = report.masks.learning
    return RunCost(learning.seconds / 60 if learning else None, images, parity.top1_drop, parity.drop_ci95)


def accuracy_lost(cost: RunCost, over: Over) -> str:
    """Points of top-1 lost over minutes or images: measured networks in gray, the run with its 95% interval.

    Raises:
        ValueError: If it is drawn over minutes and the run's are unknown.
    """
    from matplotlib.ticker import NullLocator

    at = getattr(cost, over)
    if at is None:
        raise ValueError("the run has no minutes to draw over")
    tips = {}
    with new_axes(240, grid="y") as axes:
        for method, marker in _MARKERS.items():
            runs = [m for m in measured_costs() if m.method == method]
            xs = [max(getattr(m, over), LEAST_MINUTES) for m in runs]
            axes.plot(xs, [m.drop for m in runs], marker, color=PLAIN, markersize=6, label=method, gid=method)
            tips[method] = [
                f"{m.network}, {method}{', permuted' if m.permuted else ''}: {m.drop:+.2f} points, {m.images:,} images, "
                f"{m.minutes:.2g} min"
                for m in runs
            ]
        own = max(at, LEAST_MINUTES)
        axes.plot([own, own], cost.drop_ci95, color=OWN, linewidth=2, solid_capstyle="butt")
        axes.plot([own], [cost.drop], "*", color=OWN, markersize=13, label="this run", gid="run")
        tips["run"] = [f"this run: {cost.drop:+.2f} points ({cost.drop_ci95[0]:.2f} to {cost.drop_ci95[1]:.2f})"]
        axes.axhline(0, color=PLAIN, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,g}")
        axes.set_xlabel("minutes of choosing masks" if over == "minutes" else "training images seen")
        axes.set_ylabel("top-1 lost, points")
        add_legend(axes, ncols=4)
        description = f"This run lost {cost.drop:.2f} points with {cost.images:,} images" + (
            f" and {cost.minutes:.2g} minutes of learning." if cost.minutes is not None else "."
        )
        return to_svg(axes, f"cost-{over}", f"Accuracy lost over {over}", description, tips)
