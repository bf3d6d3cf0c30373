"""CUDA graphs through cuda-python: what a stream was given once, launched again in one call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class Graph:
    """A captured piece of work."""

    def __init__(self, driver: Any, executable: Any, stream: int) -> None:
        self._driver, self._executable, self._stream = driver, executable, stream

    def launch(self) -> bool:
        """Run it on its stream; False where the driver refuses."""
        return _is_done(self._driver, self._driver.cuGraphLaunch(self._executable, self._stream))

    def close(self) -> None:
        """Free it."""
        self._driver.cuGraphExecDestroy(self._executable)


def capture(stream: int, work: Callable[[], bool]) -> Graph | None:
    """Capture what `work` puts on a stream; None where cuda-python is not installed or the work cannot be captured."""
    driver = _driver()
    if driver is None:
        return None
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    if not _is_done(driver, driver.cuStreamBeginCapture(stream, mode)):
        return None
    done = captured = False
    try:
        done = work()
    finally:
        error, graph = driver.cuStreamEndCapture(stream)
        captured = _is_done(driver, (error,))
        if captured and not done:
            driver.cuGraphDestroy(graph)
    if not (captured and done):
        log.info("the engine's work cannot be captured as a CUDA graph; it is launched layer by layer")
        return None
    error, executable = driver.cuGraphInstantiate(graph, 0)
    driver.cuGraphDestroy(graph)
    return Graph(driver, executable, stream) if _is_done(driver, (error,)) else None


def _driver() -> Any | None:
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    return driver


def _is_done(driver: Any, result: tuple[Any, ...]) -> bool:
    return bool(result[0] == driver.CUresult.CUDA_SUCCESS)
