"""Progress bars with the remaining time, on a terminal only."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")


def is_main_process() -> bool:
    """Whether this process prints: of the processes that torchrun started, only the first does."""
    return os.environ.get("RANK", "0") == "0"


@cache
def stderr_console() -> Console:
    """The shared console on stderr: lines printed through it do not overlap with a progress bar."""
    from maskplan.pipeline.core.console import EscapedConsole

    return EscapedConsole(stderr=True, highlight=False, markup=False, soft_wrap=True)


def track(items: Iterable[T], what: str | Callable[[], str], total: int, done: int = 0) -> Iterator[T]:
    """Yield from `items` and draw a bar on stderr if it is a terminal and `-q` was not given.

    Args:
        items: The work.
        what: The bar's text; a function is called again for every item.
        total: Number of items, including `done`.
        done: Number of items finished earlier.
    """
    if not _is_drawn():
        yield from items
        return
    with _progress() as progress:
        text = what if callable(what) else lambda: what
        task = progress.add_task(text(), total=total, completed=done)
        for item in items:
            yield item
            progress.update(task, advance=1, description=text())


class Bar(Protocol):
    """Draws how many steps are done, and of how many if that is known."""

    def __call__(self, done: int, total: int | None, /) -> None: ...


@contextmanager
def bar(what: str) -> Iterator[Bar]:
    """A bar for work that reports its own steps; drawn under the same conditions as in `track`."""
    if not _is_drawn():
        yield lambda done, total: None
        return
    with _progress() as progress:
        task = progress.add_task(what, total=None)

        def draw(done: int, total: int | None) -> None:
            progress.update(task, completed=done, total=total)

        yield draw


def _is_drawn() -> bool:
    return sys.stderr.isatty() and logging.getLogger("maskplan").isEnabledFor(logging.INFO)


def _progress() -> Progress:
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
    return Progress(*columns, console=stderr_console(), transient=True)
