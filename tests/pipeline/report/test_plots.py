"""The plots as SVG: what stands where, whose colors, and that names and numbers are those given."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from svg_plots import SVG, marks, words

from maskplan.pipeline.core.artifacts import MaskedLayer, MaskSet, Pattern
from maskplan.pipeline.core.reports import (
    BatchTiming,
    ClassDrop,
    DepthReport,
    Latency,
    LayerDifference,
    MethodRow,
    TimingReport,
)
from maskplan.pipeline.masking.statistics import GroupStatistics, PatternCount
from maskplan.pipeline.report import plots
from maskplan.pipeline.report.cost import RunCost, accuracy_lost

ROWS = (
    MethodRow("dense", 91.0, 99.0, 0.0, (0.0, 0.0)),
    MethodRow("magnitude", 80.0, 98.5, 11.0, (9.0, 13.0)),
    MethodRow("learned", 90.25, 98.5, 0.75, (-0.2, 1.7)),
)
SIX = ("1100", "1010", "1001", "0110", "0101", "0011")


def timing(*p50: float, pruned: bool = True) -> TimingReport:
    def latency(batch: int, ms: float) -> Latency:
        return Latency(ms, 1.2 * ms, 1.5 * ms, 1000 * batch / ms, None, None, ms, ms)

    return TimingReport(
        "a device",
        1,
        "",
        tuple(
            BatchTiming(
                8**i, 9, latency(8**i, ms), latency(8**i, ms) if pruned else None, latency(8**i, ms / 2),
                "host", 2.0, (1.9, 2.1), None,
            )
            for i, ms in enumerate(p50)
        ),
    )  # fmt: skip


def depth(*relative: float | None, tolerance: float = 0.01, first: str | None = None) -> DepthReport:
    layers = tuple(LayerDifference(f"node {i}", "Conv", f"t{i}", r, 0.9) for i, r in enumerate(relative))
    return DepthReport(4, tolerance, layers, first, ())


def masks(method: str = "learned") -> MaskSet:
    layers = tuple(MaskedLayer(f"layer {i}", (4, 4), 4, 10, 0.6 + i / 100, 0.8) for i in range(7))

    return MaskSet(Path("m"), "", "net", Pattern(2, 4), "channel", method, "", layers, ())


def histogram(*counts: int, others: int = 0) -> GroupStatistics:
    listed = tuple(PatternCount(p, n, 10) for p, n in zip(SIX, counts, strict=False))
    return GroupStatistics(sum(counts) + others, (0, 0, sum(counts), 0, 0), 5, listed, others)


CLASSES = (ClassDrop("cat", 50, 90.0, 80.0, 10.0), ClassDrop("dog", 50, 90.0, 92.0, -2.0))
COST = RunCost(2.5, 1000, 0.75, (0.2, 1.3))
ALL: dict[str, Callable[[], str]] = {
    "accuracy": lambda: plots.accuracy(ROWS),
    "classes": lambda: plots.class_drops(CLASSES),
    "latency": lambda: plots.latency(timing(1.0, 4.0)),
    "throughput": lambda: plots.throughput(timing(1.0, 4.0)),
    "depth": lambda: plots.error_by_depth(depth(0.0, 0.02, 0.5, None, first="node 1")),
    "kept": lambda: plots.kept_magnitude(masks()),
    "patterns": lambda: plots.pattern_histogram(histogram(30, 20, 20, 10, 10, 10)),
    "cost-images": lambda: accuracy_lost(COST, "images"),
    "cost-minutes": lambda: accuracy_lost(COST, "minutes"),
}


@pytest.mark.parametrize("name", ALL)
def test_every_plot_stands_on_any_paper_and_says_what_it_shows(name: str) -> None:
    svg = ALL[name]()
    root = ElementTree.fromstring(svg)
    colors = set(re.findall(r"(?:fill|stroke): *([^;\"]+)", svg))
    # Every color is one of the page's, with its light value for a file of its own.
    assert len(colors - {"none"}) >= 3
    assert all(re.fullmatch(r"none|var\(--[a-z]+, #[0-9a-f]{6}\)", c) for c in colors), colors
    assert all("fill: var(--" in t.get("style", "") for t in root.iter(f"{SVG}text"))
    # Words for those who do not see it, and no size that would not shrink with the page.
    said = dict(zip((root[0].get("id"), root[1].get("id")), (root[0], root[1]), strict=True))
    assert root.get("role") == "img"
    assert (root.get("aria-labelledby") or "").split() == list(said) == [f"{name}-title", f"{name}-description"]
    assert all((e.text or "").strip() for e in said.values())
    assert not {"width", "height"} & set(root.attrib)
    # Nothing that reaches out of the plot: a style sheet would hold for the whole page.
    assert not [e for e in root.iter() if e.tag in (f"{SVG}style", f"{SVG}script", f"{SVG}metadata", f"{SVG}image")]
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(set(ids)) == len(ids)
    assert all((i or "").startswith(f"{name}-") for i in ids)
    assert svg == ALL[name]()


def test_two_plots_in_one_page_share_no_id() -> None:
    ids = [i for make in ALL.values() for i in re.findall(r' id="([^"]*)"', make())]
    assert len(ids) > 100
    assert len(set(ids)) == len(ids)


def test_accuracy_is_a_dot_with_its_interval_and_its_number_beside_the_axes() -> None:
    svg = plots.accuracy(ROWS)
    at = [marks(svg, f"row-{i}")[0] for i in range(3)]
    dense, magnitude, learned = (x for x, _, _ in at)
    # Distances are as the accuracies'; no bar begins anywhere.
    assert (dense - magnitude) / (dense - learned) == pytest.approx(11.0 / 0.75, rel=1e-3)
    assert at[1][2] == "magnitude: 80.00%, 78.00 to 82.00%"
    assert at[2][2] == "learned: 90.25%, 89.30 to 91.20%"
    root = ElementTree.fromstring(svg)
    numbers = [t for t in root.iter(f"{SVG}text") if re.fullmatch(r"\d\d\.\d\d", t.text or "")]
    assert [t.text for t in numbers] == ["91.00", "80.00", "90.25"]
    # To the right of all that is drawn, so no line runs through them.
    assert min(float(t.get("x", "nan")) for t in numbers) > dense + 10


@pytest.mark.parametrize("make", [plots.latency, plots.throughput])
@pytest.mark.parametrize("pruned", [True, False])
def test_engines_are_drawn_by_batch(make: Callable[[TimingReport], str], pruned: bool) -> None:
    svg = make(timing(1.0, 4.0, 9.0, pruned=pruned))
    engines = ["dense", "pruned", "sparse"] if pruned else ["dense", "sparse"]
    assert [w for w in words(svg) if w in ("dense", "pruned", "sparse")] == engines
    for engine in engines:
        assert len(marks(svg, engine)) == 3
    assert {"1", "8", "64", "batch"} <= set(words(svg))


def test_times_near_each_other_are_drawn_from_zero_and_distant_ones_by_their_ratio() -> None:
    near, far = (plots.latency(timing(*p50)) for p50 in ((2.0, 6.0), (1.0, 100.0)))
    assert any(float(w) == 0 for w in words(near) if re.fullmatch(r"[\d.]+", w))
    (_, first, _), (_, second, _) = marks(near, "dense")
    (_, half, _), _ = marks(near, "sparse")
    assert (half - second) / (first - second) == pytest.approx((6 - 1) / (6 - 2), rel=1e-3)
    (_, first, _), (_, second, _) = marks(far, "dense")
    (_, half, _), _ = marks(far, "sparse")
    assert (half - first) / (first - second) == pytest.approx(math.log(2) / math.log(100), rel=1e-3)
    assert not any(w == "0" for w in words(far)[3:])


def test_throughput_is_drawn_from_zero_with_room_at_the_top() -> None:
    svg = plots.throughput(timing(100.0, 800.0))
    (_, first, tip), _ = marks(svg, "dense")
    (_, twice, _), _ = marks(svg, "sparse")
    # Twice as many images are twice as high above the zero.
    zero = 2 * first - twice
    assert tip == "dense, batch 1: 10 images/s"
    ticks = {t.text: t for t in ElementTree.fromstring(svg).iter(f"{SVG}text")}
    assert "0" in ticks
    assert zero > first > twice > 0


def test_depth_shows_where_outputs_begin_to_differ() -> None:
    report = depth(1e-9, 0.001, 0.02, 0.4, None, 0.5, first="node 2")
    svg = plots.error_by_depth(report)
    points = marks(svg, "depth")
    assert [tip for *_, tip in points] == [
        "1 node 0: 1e-07%", "2 node 1: 0.1%", "3 node 2: 2%", "4 node 3: 40%", "6 node 5: 50%"
    ]  # fmt: skip
    heights = [-y for _, y, _ in points]
    # What is far below the tolerance lies at the bottom; all else by its ratio.
    assert heights[0] == pytest.approx(heights[1], abs=0.01)
    assert heights == sorted(heights)
    step = heights[3] - heights[2]
    assert step / (heights[4] - heights[3]) == pytest.approx(math.log(20) / math.log(1.25), rel=1e-2)
    assert marks(svg, "first") == [(points[2][0], points[2][1], "node 2: 2%, the first beyond")]
    ((x, y, tip),) = marks(svg, "broken")
    assert tip == "5 node 4: not finite"
    assert points[3][0] < x < points[4][0]
    assert y < points[4][1]
    said = " ".join(words(svg))
    assert "tolerance 1%" in said
    assert "first: node 2" in said
    assert "not finite" in said


def test_a_first_layer_that_is_not_finite_is_named() -> None:
    said = words(plots.error_by_depth(depth(0.001, None, None, first="node 1")))
    assert "first: node 1, not finite" in said


@pytest.mark.parametrize("relative", [(), (0.0,), (None,), (0.0, 0.0), (1e-12, 5e-12), (3.0, 900.0)])
def test_any_depth_report_can_be_drawn(relative: tuple[float | None, ...]) -> None:
    svg = plots.error_by_depth(depth(*relative))
    assert f"{len(relative)} layers" in svg
    assert "nan" not in svg


def test_each_masked_layer_has_its_mark_and_the_most_that_the_pattern_allows() -> None:
    svg = plots.kept_magnitude(masks())
    own, best = marks(svg, "own"), marks(svg, "best")
    assert (len(own), len(best)) == (7, 7)
    assert [tip for *_, tip in own][::6] == ["1 layer 0: 60.0%", "7 layer 6: 66.0%"]
    assert all(b[1] < o[1] and b[0] == o[0] for o, b in zip(own, best, strict=True))
    assert "maximum for 2:4" in words(svg)


def test_bars_of_patterns_begin_at_zero_and_are_as_long_as_their_share() -> None:
    svg = plots.pattern_histogram(histogram(30, 20, 20, 10, 10, 10))
    root = ElementTree.fromstring(svg)
    spans = {}
    for bar in root.iter(f"{SVG}g"):
        if name := re.fullmatch(r"patterns-bar-(\d+)", bar.get("id") or ""):
            (path,) = bar.findall(f"{SVG}path")
            xs = [float(x) for x in re.findall(r"[ML] ([\d.]+)", path.get("d") or "")]
            spans[name[1]] = (min(xs), max(xs) - min(xs), path.findtext(f"{SVG}title"))
    assert list(spans) == sorted(SIX, reverse=True)
    assert len({round(start, 3) for start, *_ in spans.values()}) == 1
    assert spans["1100"][1] / spans["0011"][1] == pytest.approx(3.0, rel=1e-3)
    assert spans["1100"][2] == "1100: 30.00%"
    drawn = words(svg)
    assert [w for w in drawn if re.fullmatch(r"\d\d\.\d%", w)] == ["30.0%", "20.0%", "20.0%", "10.0%", "10.0%", "10.0%"]
    assert "\N{BLACK SQUARE}\N{BLACK SQUARE}\N{WHITE SQUARE}\N{WHITE SQUARE}" in drawn
    # The ticks of magnitude masks, where they keep ten of a hundred.
    assert len({round(x, 2) for x, *_ in marks(svg, "mag")}) == 1


def test_patterns_that_are_not_listed_are_drawn_as_others() -> None:
    svg = plots.pattern_histogram(histogram(30, 20, others=50))
    assert "others" in words(svg)
    assert "50.0%" in words(svg)
    assert marks(svg, "mag")[-1][2] == "others by magnitude: 80.00%"


def test_the_classes_that_lose_most_come_first_and_those_that_gain_not_at_all() -> None:
    classes = tuple(ClassDrop(f"class {i}", 50, 90.0, 90.0 - i, float(i)) for i in range(-3, 20))
    svg = plots.class_drops(classes)
    assert [tip.partition(":")[0] for *_, tip in marks(svg, "class")] == [f"class {i}" for i in range(19, 7, -1)]
    assert marks(svg, "class")[0][2] == "class 19: 90.0% dense, 71.0% sparse, 50 images"


@pytest.mark.parametrize(
    "name", ["cost $5 to $9", "$\\frac{$", "_private", "Lösung", "a\nb", "日本語", "<b>&\"'", "\x00\x1b[1m", "#2459a8"]
)
def test_names_are_drawn_as_they_are(name: str) -> None:
    """No markup of matplotlib's, no letter that its font lacks, nothing that XML cannot hold."""
    rows = (ROWS[0], MethodRow(name, 90.25, 98.5, 0.75, (0.2, 1.3)))
    wanted = "".join(re.sub(r"[\x00-\x08\x0b-\x1f]", "\N{REPLACEMENT CHARACTER}", name).split())
    for svg in (plots.kept_magnitude(masks(method=name)), plots.accuracy(rows)):
        drawn = "".join(ElementTree.fromstring(svg).itertext())
        assert wanted in "".join(drawn.split())
    report = DepthReport(1, 0.01, (LayerDifference(name, "Conv", "t", 0.5, 0.5),), name, ())
    assert wanted in "".join("".join(ElementTree.fromstring(plots.error_by_depth(report)).itertext()).split())


def test_long_names_are_cut_beside_the_plot_and_whole_in_the_tip() -> None:
    name = "file " + "very_" * 12 + "long.safetensors"
    svg = plots.accuracy((ROWS[0], MethodRow(name, 90.0, 99.0, 1.0, (0.5, 1.5))))
    assert name not in words(svg)
    assert any(w.endswith("long.safetensors") and len(w) <= 30 for w in words(svg))
    assert marks(svg, "row-1")[0][2].startswith(name)


def test_methods_of_one_name_have_a_dot_each() -> None:
    # A model without BatchNorm under magnitude masks is its own baseline.
    svg = plots.accuracy((ROWS[0], ROWS[2], ROWS[2]))
    assert words(svg).count("learned") == 2
    assert len(marks(svg, "row-1")) == len(marks(svg, "row-2")) == 1
