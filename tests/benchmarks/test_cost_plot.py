"""The measured points in the package are the benchmarks' results."""

from __future__ import annotations

import cost_plot
from tables import Results

from maskplan.pipeline.report.cost import measured_costs


def test_the_report_shows_what_the_benchmarks_measured() -> None:
    few, full = (Results().read(name) for name in ("few_images", "accuracy"))
    found = cost_plot.costs(few, full)
    assert tuple(found) == measured_costs()
    # Each number from the files themselves, once.
    (vgg,) = [p for p in found if (p.network, p.method, p.images) == ("vgg16_bn_quarter", "learned", 256)]
    (run,) = [r for r in few if (r["model"], r["images"]) == ("vgg16_bn_quarter", 256)]
    row = run["rows"]["learned, recalibrated"]
    assert (vgg.drop, list(vgg.drop_ci95)) == (row["drop"], row["drop_ci95"])
    assert vgg.minutes == run["minutes"]["learned, recalibrated"]
    of_one = [r for r in few if (r["model"], r["seed"], r["images"]) == ("shufflenet_v2_x0_5", 0, 1024)]
    permuted = "learned, permuted, recalibrated"
    drops = [r["rows"][permuted]["drop"] for r in of_one if permuted in r["rows"]]
    learned = [p for p in found if (p.network, p.method, p.images) == ("shufflenet_v2_x0_5", "learned", 1024)]
    assert drops == [p.drop for p in learned if p.permuted]
    on_all = [p for p in found if p.images == max(run["images"] for run in full)]
    assert sum(p.permuted for p in on_all) == sum("--permute" in run["command"] for run in full) > 0
    rows = [row for run in few if not run.get("busy") for row in run["rows"]]
    assert len(found) == sum(row in cost_plot.METHODS for row in rows) + len(full)


def test_minutes_of_a_busy_machine_are_not_plotted() -> None:
    few = Results().read("few_images")[:1]
    assert len(cost_plot.costs(few, [])) == 3
    assert cost_plot.costs([few[0] | {"busy": True}], []) == []
