"""Progress bars with time left, on a terminal only; everywhere else, silence."""

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
    """Whether this process tells people what it does: of those that torchrun started, the first."""
    return os.environ.get("RANK", "0") == "0"


@cache
def stderr_console() -> Console:
    """The one console on stderr: lines printed through it stay clear of a bar that is being drawn."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def track(items: Iterable[T], what: str | Callable[[], str], total: int, done: int = 0) -> Iterator[T]:
    """Yield from `items`, drawing a bar on stderr while a person is looking and `-q` was not given.

    Args:
        items: What is worked on.
        what: The bar's text; a function is asked anew for every item.
        total: How many there are, those included that were done before.
        done: How many of them were done before.
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
    """Draws how many steps are done, of how many where that is known anew."""

    def __call__(self, done: int, total: int | None, /) -> None: ...


@contextmanager
def bar(what: str) -> Iterator[Bar]:
    """A bar for work that reports its own steps, drawn where `track` would draw."""
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
