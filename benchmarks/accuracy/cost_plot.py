"""Draw what masks cost against what they need: points of top-1 lost over minutes, and over images.

    python benchmarks/accuracy/cost_plot.py

reads few_images.json and accuracy.json next to this script, and writes docs/cost.svg and the points among which a run's
report shows where it stands, `pipeline/report/measured_costs.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from tables import Results

from maskplan.pipeline.core.files import write_json
from maskplan.pipeline.core.serialization import encode
from maskplan.pipeline.report.cost import LEAST_MINUTES, MeasuredCost

mpl.use("svg")
# The same bytes from the same numbers.
mpl.rcParams["svg.hashsalt"] = "maskplan"
# Text instead of the outlines of its letters.
mpl.rcParams["svg.fonttype"] = "none"

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "cost.svg"
COSTS = ROOT / "pipeline" / "report" / "measured_costs.json"
# Names of the methods in reports; masks by synthetic images are not compared with those by real ones.
METHODS = {
    "magnitude, recalibrated": "magnitude",
    "layerwise, recalibrated": "layerwise",
    "learned, recalibrated": "learned",
    "layerwise, permuted, recalibrated": "layerwise",
    "learned, permuted, recalibrated": "learned",
}
ROWS = {
    "magnitude, recalibrated": ("magnitude", "o"),
    "layerwise, synthetic images": ("layer-wise, synthetic images", "v"),
    "layerwise, recalibrated": ("layer-wise", "s"),
    "learned, recalibrated": ("learned", "D"),
    "learned, permuted, recalibrated": ("learned, channels permuted", "P"),
}


def main() -> None:
    """Draw both panels, and write the points."""
    everything = Results().read("few_images")
    write_json(COSTS, encode(costs(everything, Results().read("accuracy"))))
    runs = quiet(everything)
    figure, (over_minutes, over_images) = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    networks = sorted({run["model"] for run in runs})
    for color, network in enumerate(networks):
        of_network = sorted((r for r in runs if r["model"] == network), key=lambda r: r["images"])
        for row, (label, marker) in ROWS.items():
            with_row = [r for r in of_network if row in r["rows"]]
            draw_minutes(over_minutes, [r for r in with_row if r["images"] == 1024], row, marker, f"C{color}")
            if row != "layerwise, synthetic images":
                draw_images(over_images, with_row, row, marker, f"C{color}")
            if color == 0:
                over_images.plot([], [], f"{marker}k", linestyle="", label=label)
        over_images.plot([], [], color=f"C{color}", label=network)
    over_minutes.set(xscale="log", xlabel="minutes on one or two cores", ylabel="points of top-1 lost", ylim=(0, None))
    over_images.set(xscale="log", xlabel="images without labels")
    over_images.set_xticks([256, 1024, 4096], ["256", "1,024", "4,096"])
    over_images.minorticks_off()
    figure.legend(loc="outside right upper", fontsize=8)
    for axes in (over_minutes, over_images):
        axes.grid(alpha=0.3)
    figure.savefig(OUT, metadata={"Date": None})


def quiet(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The runs that had the machine to themselves: the minutes of others say nothing."""
    return [run for run in runs if not run.get("busy")]


def costs(few: Sequence[Mapping[str, Any]], full: Sequence[Mapping[str, Any]]) -> list[MeasuredCost]:
    """One point for each network, method and number of images; learning from all training images from `full`."""
    points = [
        _cost(run, row, method, run["minutes"].get(row, 0.0), is_permuted="permuted" in row)
        for run in quiet(few)
        for row, method in METHODS.items()
        if row in run["rows"]
    ]
    row = "maskplan, recalibrated"
    points += [_cost(run, row, "learned", run["minutes"], is_permuted=bool(run.get("permuted"))) for run in full]
    return sorted(points, key=lambda p: (p.network, p.method, p.images, p.minutes))


def _cost(run: Mapping[str, Any], row: str, method: str, minutes: float, *, is_permuted: bool) -> MeasuredCost:
    drop, (low, high) = run["rows"][row]["drop"], run["rows"][row]["drop_ci95"]
    return MeasuredCost(run["model"], method, run["images"], minutes, drop, (low, high), is_permuted)


def draw_minutes(axes: Axes, runs: Sequence[Mapping[str, Any]], row: str, marker: str, color: str) -> None:
    """One point for each run, with its 95% interval."""
    for run in runs:
        minutes = run["minutes"].get(row, 0.0) + (run["minutes"]["synthesize"] if "synthetic" in row else 0.0)
        drop = run["rows"][row]["drop"]
        errors = [[abs(bound - drop)] for bound in run["rows"][row]["drop_ci95"]]
        axes.errorbar(
            max(minutes, LEAST_MINUTES), drop, errors, marker=marker, color=color, markersize=5, linewidth=1, capsize=2
        )


def draw_images(axes: Axes, runs: Sequence[Mapping[str, Any]], row: str, marker: str, color: str) -> None:
    """Means over the seeds; a line joins those of one setting, which the learning rate tells."""
    for rate in sorted({run["rate"] for run in runs}):
        drops: dict[int, list[float]] = {}
        for run in runs:
            if run["rate"] == rate:
                drops.setdefault(run["images"], []).append(run["rows"][row]["drop"])
        means = {images: fmean(drops[images]) for images in sorted(drops)}
        axes.plot(list(means), list(means.values()), marker=marker, color=color, markersize=5, linewidth=1)


if __name__ == "__main__":
    main()
