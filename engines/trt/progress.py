"""Show TensorRT's progress in the progress bar; Ctrl-C stops a build between two steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from maskplan.pipeline.core.interrupts import INTERRUPTS
from maskplan.pipeline.core.progress import Bar, bar


@contextmanager
def progress_monitor(trt: Any) -> Iterator[Any]:
    """A monitor that shows the outermost phase, and requests TensorRT to stop after a signal.

    Raises:
        KeyboardInterrupt: A signal arrived. It is raised at the end of the block: TensorRT's callbacks cannot raise.
    """
    with bar("build") as progress_bar, INTERRUPTS.deferred():
        yield _monitor_class(trt)(progress_bar)
    INTERRUPTS.raise_pending()


def _monitor_class(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self, progress_bar: Bar) -> None:
            trt.IProgressMonitor.__init__(self)
            self._bar, self._outermost = progress_bar, ""

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._outermost = phase_name
                self._bar(0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self._outermost:
                self._bar(step + 1, None)
            return INTERRUPTS.pending is None

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor
