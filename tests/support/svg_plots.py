"""Reading the report's plots: where marks stand, and the text."""

from __future__ import annotations

from xml.etree import ElementTree

SVG = "{http://www.w3.org/2000/svg}"


def marks(svg: str, group: str) -> list[tuple[float, float, str]]:
    """Where each mark of a group stands (x, y from the top left) and its tip."""
    root = ElementTree.fromstring(svg)
    (found,) = (g for g in root.iter(f"{SVG}g") if (g.get("id") or "").endswith(f"-{group}"))
    return [
        (float(u.get("x", "nan")), float(u.get("y", "nan")), u.findtext(f"{SVG}title", ""))
        for u in found.iter(f"{SVG}use")
    ]


def words(svg: str) -> list[str]:
    return [t.text or "" for t in ElementTree.fromstring(svg).iter(f"{SVG}text")]
