"""The report's plots, as SVG text that stands in the page itself."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import MaskSet
from pipeline.reports import MethodRow, TimingReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = "#3566b0", "#d9722e", "#8a8f98"


def accuracy(rows: tuple[MethodRow, ...]) -> str:
    """Top-1 by method; the whiskers are the paired interval of the drop against dense."""
    figure, axes = _figure(height=0.6 + 0.42 * len(rows))
    values = [row.top1 for row in rows][::-1]
    dense = rows[0].top1
    colours = [_GREY if row.name == "dense" else _BLUE for row in rows][::-1]
    axes.barh(range(len(rows)), values, color=colours, height=0.6)
    axes.set_yticks(range(len(rows)), [row.name for row in rows][::-1])
    for y, row in enumerate(rows[::-1]):
        low, high = dense - row.drop_ci95[1], dense - row.drop_ci95[0]
        if row.name != "dense":
            axes.plot([low, high], [y, y], color="#222", linewidth=1.2)
        axes.annotate(
            f" {row.top1:.2f}",
            (max(row.top1, high if row.name != "dense" else 0), y),
            va="center",
            fontsize=9,
        )
    lowest = min(min(values), *(dense - row.drop_ci95[1] for row in rows))
    axes.set_xlim(max(0.0, lowest - 5), 104)
    axes.set_xlabel("top-1 accuracy, %")
    return _svg(figure)


def latency(timing: TimingReport) -> str:
    """Median latency of the engines by batch size."""
    figure, axes = _figure(height=2.6)
    positions = range(len(timing.batches))
    for shift, name, colour in ((-0.2, "dense", _GREY), (0.2, "sparse", _BLUE)):
        values = [getattr(b, name) for b in timing.batches]
        bars = axes.bar([p + shift for p in positions], [v.p50_ms for v in values], 0.38, label=name, color=colour)
        for bar, value in zip(bars, values, strict=True):
            axes.vlines(bar.get_x() + 0.19, value.p50_ms, value.p90_ms, color="#222", linewidth=1.2)
        axes.bar_label(bars, labels=[f"{v.p50_ms:.3g}" for v in values], fontsize=9, padding=4)
    axes.set_xticks(list(positions), [f"batch {b.batch}" for b in timing.batches])
    axes.set_ylabel("ms, median and p90")
    axes.margins(y=0.18)
    axes.legend(frameon=False, fontsize=9)
    return _svg(figure)


def kept_magnitude(masks: MaskSet) -> str:
    """Share of each masked layer's magnitude that its mask keeps, beside the most that the pattern allows."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(height=2.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    positions = list(range(1, len(masks.masked) + 1))
    axes.plot(positions, [100 * m.kept_best for m in masks.masked], ".", color=_ORANGE, label="best")
    axes.plot(positions, [100 * m.kept for m in masks.masked], ".-", color=_BLUE, linewidth=0.8, label="own")
    axes.set_xlabel("masked layer, from input to output")
    axes.set_ylabel("magnitude kept, %")
    # Written into the legend afterwards: it would leave out a label that begins with an underscore.
    best, own = axes.legend(frameon=False, fontsize=9).get_texts()
    best.set_text(f"most that {masks.pattern} allows")
    own.set_text(masks.method)
    return _svg(figure)


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib as mpl
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        # A dollar sign in a name is no formula.
        text.set_parse_math(False)
    buffer = io.StringIO()
    # Letters stay letters (searchable, small), and ids do not change from run to run.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "maskplan", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
