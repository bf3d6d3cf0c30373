"""Show a builder's progress in the progress bar, with the time left; Ctrl-C stops a build between two steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from maskplan.pipeline.core.interrupts import INTERRUPTS
from maskplan.pipeline.core.progress import Bar, bar

_PERCENT = 100


@contextmanager
def progress_monitor(trt: Any) -> Iterator[Any]:
    """A monitor that shows how much of the build is done, and requests the builder to stop after a signal.

    Raises:
        KeyboardInterrupt: A signal arrived. It is raised at the end of the block: the builder's callbacks cannot raise.
    """
    with bar("build, percent") as progress_bar, INTERRUPTS.deferred():
        yield _monitor_class(trt)(progress_bar)
    INTERRUPTS.raise_pending()


class Phases:
    """The phases of a build, nested as the builder reports them, and the share of all their steps that is done.

    A phase within another is a part of the other's current step. Nearly all of a build may be in one step of the outermost
    phase, so its own steps alone tell little. The share never falls: the builder may repeat phases within one step.
    """

    def __init__(self) -> None:
        self._steps: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._parent: dict[str, str] = {}
        self._share = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        self._steps[name], self._done[name], self._parent[name] = max(steps, 1), 0, parent or ""

    def step(self, name: str, number: int) -> None:
        """A phase has finished its step of this number, counted from 0."""
        if name in self._steps:
            self._done[name] = number + 1

    def finish(self, name: str) -> None:
        """A phase ends, also before its last step."""
        outermost = self._parent.get(name) == ""
        for phases in (self._steps, self._done, self._parent):
            phases.pop(name, None)
        if outermost:
            self._share = 1.0

    def share(self) -> float:
        """The share that is done, 0 to 1."""
        outermost = [name for name, parent in self._parent.items() if not parent]
        self._share = max([self._share, *(self._share_of(name) for name in outermost)])
        return self._share

    def _share_of(self, name: str) -> float:
        inner = max((self._share_of(n) for n, parent in self._parent.items() if parent == name), default=0.0)
        return min(1.0, (self._done[name] + inner) / self._steps[name])


def _monitor_class(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self, progress_bar: Bar) -> None:
            trt.IProgressMonitor.__init__(self)
            self._bar, self._phases = progress_bar, Phases()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases.start(phase_name, parent_phase, num_steps)
            self._draw()

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._phases.step(phase_name, step)
            self._draw()
            return INTERRUPTS.pending is None

        def phase_finish(self, phase_name: str) -> None:
            self._phases.finish(phase_name)
            self._draw()

        def _draw(self) -> None:
            self._bar(int(_PERCENT * self._phases.share()), _PERCENT)

    return Monitor
