"""Consoles of rich whose texts are escaped. Imported where something is drawn: rich takes its time."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from maskplan.pipeline.core.escaping import printable


class EscapedConsole(Console):
    """A console whose texts are escaped before rich adds its own control characters: colors, and moves of the cursor."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def stdout_console() -> Console:
    """A console on stdout for tables. Names may contain what rich would take for markup."""
    return EscapedConsole(highlight=False, markup=False)
