"""Progress bars with time left, on a terminal only; everywhere else, silence."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


@cache
def narrator() -> Console:
    """The one console on stderr: lines printed through it stay clear of a bar that is being drawn."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yield from `items`, drawing a bar on stderr while a person is looking and `-q` was not given."""
    if not sys.stderr.isatty() or not logging.getLogger("pipeline").isEnabledFor(logging.INFO):
        yield from items
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=narrator(), transient=True) as progress:
        yield from progress.track(items, total=total, description=what)
