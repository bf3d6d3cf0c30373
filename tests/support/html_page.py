"""Read an HTML page: its tags, text and scripts, and what a browser would fetch for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser


class Page(HTMLParser):
    """Every tag with its attributes, the text, the scripts, and tags that are not closed in order."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input", "base", "source", "embed"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.styles: list[str] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.crossed: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.crossed.append(tag)

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        {"script": self.scripts, "style": self.styles}.get(inside, self.texts).append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def fetched(self) -> Iterator[str]:
        """What a browser would ask for or run beyond the page itself."""
        for tag, attributes in self.tags:
            if tag in ("iframe", "object", "embed", "base", "form"):
                yield tag
            for name, value in attributes.items():
                if name.startswith("on"):
                    yield f"{tag} {name}"
                if name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action", "background"):
                    yield from () if (value or "").startswith(("#", "data:")) else (f"{tag} {name}={value}",)
                yield from outside(value or "")
        yield from outside(" ".join(self.styles))
        yield from (
            script for script in self.scripts if re.search(r"fetch|XMLHttp|import|WebSocket|https?:|eval", script)
        )


def outside(style: str) -> Iterator[str]:
    yield from re.findall(r"@import|expression\s*\(", style)
    yield from (u for u in re.findall(r"url\(\s*['\"]?([^)'\"]*)", style) if not u.startswith(("#", "data:")))


def drawn(page: Page) -> set[str]:
    """Which plots stand in a page."""
    return {(a.get("aria-labelledby") or "").partition("-title")[0] for a in page.attributes("svg")}
