"""How the report's plots are drawn, and the SVG text that is embedded in the page.

Colors are the page's CSS variables with the light value as a fallback, so that a plot is legible in light and dark mode and
as a separate file. Every plot has a title and a description for screen readers, and a tooltip for each mark.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend

# Without a home folder to write to, matplotlib works as well, after two warnings about its cache.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

# Colors that matplotlib draws with, and the CSS variables that replace them.
INK, SOFT, LINE, PAPER = "#1c2026", "#59606b", "#d9dde3", "#fffffe"
OWN, OTHER, PLAIN, BAD = "#2459a8", "#b4540a", "#727984", "#b3261d"
_VARIABLES = {
    INK: "ink", SOFT: "soft", LINE: "line", PAPER: "paper",
    OWN: "own", OTHER: "other", PLAIN: "plain", BAD: "bad",
}  # fmt: skip

# Size in points: about the width of the plot in the page, so that text has its nominal size there.
_WIDTH, _DOT = 420, 72
TEXT, SMALL = 12, 11.5
_LONGEST_NAME = 30

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_FONT = re.compile(r"font-family: [^;]*; *")
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@contextmanager
def new_axes(height: float, grid: Literal["x", "y"]) -> Iterator[Axes]:
    """Axes of a figure `height` units high, with thin lines across the `x` or `y` axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH / _DOT, height / _DOT), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left" if grid == "y" else "bottom"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(LINE)
    axes.tick_params(color=LINE, labelsize=TEXT, labelcolor=INK, length=0, pad=6)
    axes.grid(axis=grid, color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=SOFT, size=SMALL)
    with warnings.catch_warnings():
        # The browser renders the text; glyphs that the measuring font lacks do not matter.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield axes


def add_legend(axes: Axes, ncols: int = 1) -> Legend:
    """Add a legend above the axes, where it hides no mark."""
    return axes.legend(
        frameon=False, fontsize=SMALL, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=ncols,
        handletextpad=0.4, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip


def set_scale(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic if all values are positive and span a factor of more than 8, else from zero."""
    positive = [v for v in values if v > 0]
    if positive and len(positive) == len(values) and max(positive) > 8 * min(positive):
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0) if max(positive) < 500 * min(positive) else (1.0,)))
        axes.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="minor", length=0)
        axes.set_ylim(min(positive) / 1.6, max(positive) * 1.6)
    else:
        axes.set_ylim(0, 1.15 * max([*values, 0.0]) or 1.0)


def write_right(axes: Axes, y: float, text: str) -> None:
    """Write text to the right of the axes, clear of all marks."""
    axes.annotate(text, (1, y), (1.015, y), ("axes fraction", "data"), va="center", fontsize=TEXT)


def shorten(name: str) -> str:
    """Shorten a name to fit next to a plot; its end is kept, which is the most specific part."""
    name = _for_xml(name)
    return name if len(name) <= _LONGEST_NAME else "\N{HORIZONTAL ELLIPSIS}" + name[1 - _LONGEST_NAME :]


def _for_xml(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def to_svg(axes: Axes, name: str, title: str, description: str, tips: Mapping[str, Sequence[str]]) -> str:
    """The figure's SVG text; `name` makes its ids unique, `tips` has a tooltip for each mark of a group."""
    import matplotlib as mpl
    from matplotlib.text import Text

    figure = axes.get_figure(root=True)
    assert figure is not None
    for text in figure.findobj(Text):
        # A dollar sign in a name is not a formula; black is replaced by the page's text color.
        text.set_parse_math(False)
        if text.get_color() == "black":
            text.set_color(INK)
    buffer = io.StringIO()
    # Keep text as text (searchable, small), and the ids the same in every run.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "maskplan", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True, dpi=_DOT)
    root = ElementTree.fromstring(buffer.getvalue())
    _strip_svg(root)
    _add_tips(root, tips)
    _set_identity(root, name, title, description)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, "unicode")


def _strip_svg(root: ElementTree.Element) -> None:
    """Remove what only a separate file needs (metadata, style sheet, fixed size) and use the page's colors."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for attribute in ("width", "height"):
        root.attrib.pop(attribute, None)
    for element in root.iter():
        if style := element.get("style"):
            for color, variable in _VARIABLES.items():
                style = style.replace(color, f"var(--{variable}, {color})")
            # The page sets the font.
            element.set("style", _FONT.sub("", style))
    root.set("font-family", "system-ui, sans-serif")


def _add_tips(root: ElementTree.Element, tips: Mapping[str, Sequence[str]]) -> None:
    for group in root.iter(f"{{{_SVG}}}g"):
        texts = tips.get(group.get("id", ""))
        if texts:
            marks = list(group.iter(f"{{{_SVG}}}use")) or [p for p in group if p.tag == f"{{{_SVG}}}path"]
            for mark, text in zip(marks, texts, strict=False):
                ElementTree.SubElement(mark, f"{{{_SVG}}}title").text = _for_xml(text)


def _set_identity(root: ElementTree.Element, name: str, title: str, description: str) -> None:
    """Add title and description, and prefix all ids: a page holds several plots."""
    used = {f"#{e.get('id')}" for e in root.iter() if e.get("id")}
    for element in root.iter():
        if element.get("id"):
            element.set("id", f"{name}-{element.get('id')}")
        for attribute, value in element.items():
            if value in used:
                element.set(attribute, f"#{name}-{value[1:]}")
            elif value.startswith("url(#"):
                element.set(attribute, f"url(#{name}-{value[5:]}")
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-description")
    for tag, text in (("desc", description), ("title", title)):
        element = ElementTree.Element(
            f"{{{_SVG}}}{tag}", {"id": f"{name}-{'title' if tag == 'title' else 'description'}"}
        )
        element.text = _for_xml(text)
        root.insert(0, element)
