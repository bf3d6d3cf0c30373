"""The report's plots of a run, as SVG text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from maskplan.pipeline.core.artifacts import MaskSet
from maskplan.pipeline.core.reports import ClassDrop, DepthReport, Latency, MethodRow, TimingReport
from maskplan.pipeline.masking.statistics import GroupStatistics
from maskplan.pipeline.report.drawing import (
    BAD,
    LINE,
    OTHER,
    OWN,
    PLAIN,
    SMALL,
    SOFT,
    add_legend,
    new_axes,
    set_scale,
    shorten,
    to_svg,
    write_right,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class _Style(NamedTuple):
    """Color, marker and horizontal offset of an engine's marks; the offset keeps equal times visible."""

    color: str
    marker: str
    offset: float


_STYLES = {
    "dense": _Style(PLAIN, "s", -0.08),
    "pruned": _Style(OTHER, "^", 0.0),
    "sparse": _Style(OWN, "o", 0.08),
}


def accuracy(rows: Sequence[MethodRow]) -> str:
    """Top-1 by method: one dot each, with the paired interval of the drop from dense as a line."""
    with new_axes(52 + 26 * len(rows), grid="x") as axes:
        dense = rows[0].top1
        axes.axvline(dense, color=PLAIN, linewidth=1, linestyle=(0, (4, 3)))
        ends = [dense]
        tips = {}
        for y, row in enumerate(rows):
            plain = row.name == "dense"
            low, high = (row.top1, row.top1) if plain else (dense - row.drop_ci95[1], dense - row.drop_ci95[0])
            ends += [row.top1, low, high]
            axes.plot([low, high], [y, y], color=OWN, linewidth=2, solid_capstyle="butt")
            axes.plot([row.top1], [y], "o", color=PLAIN if plain else OWN, markersize=8, gid=f"row-{y}")
            write_right(axes, y, f"{row.top1:.2f}")
            tips[f"row-{y}"] = [f"{row.name}: {row.top1:.2f}%" + ("" if plain else f", {low:.2f} to {high:.2f}%")]
        axes.set_yticks(range(len(rows)), [shorten(row.name) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        room = max(0.6, 0.08 * (max(ends) - min(ends)))
        axes.set_xlim(min(ends) - room, max(ends) + room)
        axes.set_xlabel("top-1 accuracy, %")
        description = "; ".join(f"{row.name} {row.top1:.2f}%" for row in rows)
        return to_svg(
            axes, "accuracy", "Accuracy by method", f"Top-1: {description}. Lines are paired 95% intervals.", tips
        )


def class_drops(classes: Sequence[ClassDrop], max_rows: int = 12) -> str:
    """Drop of top-1, in points, of the classes that lose most: one dot each, on a line from zero."""
    worst = sorted((c for c in classes if c.drop > 0), key=lambda c: (-c.drop, c.name))[:max_rows]
    with new_axes(52 + 22 * len(worst), grid="x") as axes:
        at = range(len(worst))
        axes.hlines(at, 0, [c.drop for c in worst], color=OWN, linewidth=2)
        axes.plot([c.drop for c in worst], at, "o", color=OWN, markersize=7, gid="class")
        for y, found in enumerate(worst):
            write_right(axes, y, f"{found.drop:+.1f}")
        axes.set_yticks(list(at), [shorten(c.name) for c in worst])
        axes.set_ylim(len(worst) - 0.4, -0.6)
        axes.set_xlim(0, 1.06 * worst[0].drop if worst else 1)
        axes.set_xlabel("drop in top-1, points")
        tips = [f"{c.name}: {c.top1_dense:.1f}% dense, {c.top1_sparse:.1f}% sparse, {c.images} images" for c in worst]
        description = "; ".join(f"{c.name} {c.drop:+.1f}" for c in worst)
        return to_svg(axes, "classes", "Drop by class", f"Points of top-1 lost: {description}.", {"class": tips})


def latency(timing: TimingReport) -> str:
    """Median latency of the engines by batch size, with a line up to the 90th percentile."""
    with new_axes(220, grid="y") as axes:
        tips = {}
        for name, found in _engines(timing).items():
            at = [i + _STYLES[name].offset for i, _ in found]
            spans = [(v.p50_ms, v.p90_ms) for _, v in found]
            axes.vlines(at, *zip(*spans, strict=True), color=_STYLES[name].color, linewidth=2, alpha=0.45)
            _plot_engine(axes, name, at, [v.p50_ms for _, v in found])
            tips[name] = [
                f"{name}, batch {timing.batches[i].batch}: {v.p50_ms:.4g} ms, 90th percentile {v.p90_ms:.4g} ms"
                for i, v in found
            ]
        _label_batches(axes, timing)
        set_scale(axes, [ms for found in _engines(timing).values() for _, v in found for ms in (v.p50_ms, v.p90_ms)])
        axes.set_ylabel("ms a batch")
        return to_svg(axes, "latency", "Latency by batch size", _describe_by_batch(timing, "p50_ms", "ms"), tips)


def throughput(timing: TimingReport) -> str:
    """Images per second of the engines by batch size, at the median latency."""
    with new_axes(220, grid="y") as axes:
        tips = {}
        for name, found in _engines(timing).items():
            _plot_engine(axes, name, [i + _STYLES[name].offset for i, _ in found], [v.images_per_s for _, v in found])
            tips[name] = [f"{name}, batch {timing.batches[i].batch}: {v.images_per_s:,.0f} images/s" for i, v in found]
        _label_batches(axes, timing)
        axes.set_ylim(0, 1.12 * max(v.images_per_s for found in _engines(timing).values() for _, v in found))
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.set_ylabel("images/s")
        description = _describe_by_batch(timing, "images_per_s", "images/s")
        return to_svg(axes, "throughput", "Throughput by batch size", description, tips)


def error_by_depth(report: DepthReport) -> str:
    """Relative difference of each layer's output, from input to output; one that is not finite is a cross at the top."""
    from matplotlib.ticker import MaxNLocator

    with new_axes(235, grid="y") as axes:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        numbered = list(enumerate(report.layers, 1))
        finite = [(i, layer, 100 * layer.relative) for i, layer in numbered if layer.relative is not None]
        broken = [(i, layer) for i, layer in numbered if layer.relative is None]
        limit = 100 * report.tolerance
        # Where differences begin matters, not how small they are before: values far below the tolerance go to the bottom.
        wide_range = limit > 0 and max((v for _, _, v in finite), default=0.0) > 8 * limit
        floor = limit / 10 if wide_range else 0.0
        axes.axhline(limit, color=PLAIN, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(
            [i for i, _, _ in finite],
            [max(v, floor) for _, _, v in finite],
            "o-",
            color=OWN,
            linewidth=1,
            markersize=5 if len(finite) <= 60 else 3,
            gid="depth",
        )
        set_scale(axes, [max(v, floor) for _, _, v in finite] + [limit])
        if wide_range:
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}" if y > 1.01 * floor else f"≤ {y:g}")
        if broken:
            ended = report.first in [layer.node for _, layer in broken]
            top = axes.get_xaxis_transform()
            axes.plot(
                [i for i, _ in broken],
                [0.97] * len(broken),
                "x",
                color=BAD,
                markersize=7,
                transform=top,
                gid="broken",
                label=f"first: {shorten(str(report.first))}, not finite" if ended else "not finite",
            )
        for i, layer, value in finite:
            if layer.node == report.first:
                axes.plot(
                    [i], [value], "o", color=BAD, markersize=8, gid="first", label=f"first: {shorten(layer.node)}"
                )
        axes.annotate(
            f"tolerance {limit:.3g}%", (1, limit), (0, 4), ("axes fraction", "data"), "offset points",
            ha="right", va="bottom", fontsize=SMALL, color=SOFT,
        )  # fmt: skip
        axes.set_xlim(0.5, max(len(report.layers), 1) + 0.5)
        axes.set_xlabel("layer, from input to output")
        axes.set_ylabel("difference, %")
        if axes.get_legend_handles_labels()[1]:
            add_legend(axes, ncols=2)
        tips = {
            "depth": [f"{i} {layer.node}: {value:.3g}%" for i, layer, value in finite],
            "broken": [f"{i} {layer.node}: not finite" for i, layer in broken],
            "first": [
                f"{layer.node}: {v:.3g}%, the first beyond" for _, layer, v in finite if layer.node == report.first
            ],
        }
        where = f"{report.first} is the first layer beyond it" if report.first else "no layer is beyond it"
        description = f"{len(report.layers)} layers; the tolerance is {limit:.3g}%; {where}."
        return to_svg(axes, "depth", "Difference from the dense model by depth", description, tips)


def kept_magnitude(masks: MaskSet) -> str:
    """Share of each masked layer's magnitude that its mask keeps, and the maximum that the pattern allows."""
    from matplotlib.ticker import MaxNLocator

    with new_axes(220, grid="y") as axes:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        at = list(range(1, len(masks.masked) + 1))
        best, own = [100 * m.kept_best for m in masks.masked], [100 * m.kept for m in masks.masked]
        axes.vlines(at, own, best, color=LINE, linewidth=2)
        axes.plot(at, best, "_", color=OTHER, markersize=9, markeredgewidth=2, label="best", gid="best")
        axes.plot(at, own, "o", color=OWN, markersize=5, label="own", gid="own")
        low, high = min(own, default=0.0), max(best, default=100.0)
        room = max(1.0, 0.12 * (high - low))
        axes.set_ylim(low - room, high + room)
        axes.set_xlim(0.5, len(at) + 0.5)
        axes.set_xlabel("masked layer, from input to output")
        axes.set_ylabel("magnitude kept, %")
        # Set in the legend afterwards: matplotlib omits labels that begin with an underscore.
        legend = add_legend(axes, ncols=2)
        names = (f"maximum for {masks.pattern}", shorten(masks.method))
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set_text(name)
        tips = {
            "own": [f"{i} {m.name}: {100 * m.kept:.1f}%" for i, m in zip(at, masks.masked, strict=True)],
            "best": [f"{i} {m.name}: at most {100 * m.kept_best:.1f}%" for i, m in zip(at, masks.masked, strict=True)],
        }
        description = f"{len(at)} masked layers keep {low:.1f}% to {max(own, default=100.0):.1f}% of their magnitude."
        return to_svg(axes, "kept", "Magnitude kept by layer", description, tips)


def pattern_histogram(found: GroupStatistics) -> str:
    """Share of the groups with each pattern, compared with magnitude masks of the same weights."""
    # Complete lists are ordered by pattern; lists of the most frequent patterns by frequency.
    rows = sorted(found.patterns, key=lambda p: p.pattern, reverse=True) if not found.others else list(found.patterns)
    own = [100 * p.groups / max(found.groups, 1) for p in rows]
    magnitude = [100 * p.by_magnitude / max(found.groups, 1) for p in rows]
    names = [p.pattern for p in rows]
    if found.others:
        listed = sum(p.by_magnitude for p in rows)
        own.append(100 * found.others / found.groups)
        magnitude.append(100 * (found.groups - listed) / found.groups)
        names.append("others")
    with new_axes(66 + 22 * len(names), grid="x") as axes:
        at = range(len(names))
        bars = axes.barh(at, own, 0.62, color=OWN)
        axes.plot(
            magnitude, at, "|", color=OTHER, markersize=14, markeredgewidth=2.5, label="magnitude masks", gid="mag"
        )
        for bar, name, share in zip(bars, names, own, strict=True):
            bar.set_gid(f"bar-{name}")
            write_right(axes, bar.get_y() + bar.get_height() / 2, f"{share:.1f}%")
        axes.set_yticks(list(at), [_squares(name) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 1.06 * max([*own, *magnitude, 1.0]))
        axes.set_xlabel("share of groups, %")
        add_legend(axes)
        tips = {f"bar-{n}": [f"{n}: {share:.2f}%"] for n, share in zip(names, own, strict=True)}
        tips["mag"] = [f"{n} by magnitude: {share:.2f}%" for n, share in zip(names, magnitude, strict=True)]
        shares = "; ".join(f"{n} {share:.1f}%" for n, share in zip(names, own, strict=True))
        return to_svg(axes, "patterns", "Patterns of groups", f"Shares of groups: {shares}.", tips)


def _engines(timing: TimingReport) -> dict[str, list[tuple[int, Latency]]]:
    """The latencies of each engine, with the index of the batch size."""
    found = {
        name: [(i, timed) for i, b in enumerate(timing.batches) if (timed := getattr(b, name)) is not None]
        for name in _STYLES
    }
    return {name: timed for name, timed in found.items() if timed}


def _plot_engine(axes: Axes, name: str, at: list[float], values: list[float]) -> None:
    style = _STYLES[name]
    axes.plot(at, values, color=style.color, linewidth=1, alpha=0.35)
    axes.plot(at, values, style.marker, color=style.color, markersize=7, label=name, gid=name)


def _label_batches(axes: Axes, timing: TimingReport) -> None:
    axes.set_xticks(range(len(timing.batches)), [str(b.batch) for b in timing.batches])
    axes.set_xlim(-0.5, len(timing.batches) - 0.5)
    axes.set_xlabel("batch")
    add_legend(axes, ncols=3)


def _describe_by_batch(timing: TimingReport, field: str, unit: str) -> str:
    return "; ".join(
        f"batch {b.batch}: dense {getattr(b.dense, field):,.4g}, sparse {getattr(b.sparse, field):,.4g} {unit}"
        for b in timing.batches
    )


def _squares(pattern: str) -> str:
    return pattern.replace("1", "\N{BLACK SQUARE}").replace("0", "\N{WHITE SQUARE}")
