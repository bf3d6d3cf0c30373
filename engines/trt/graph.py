"""CUDA graphs through cuda-python: record the work of a stream once, replay it in a single launch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class Graph:
    """An instantiated CUDA graph."""

    def __init__(self, driver: Any, executable: Any, stream: int) -> None:
        self._driver, self._executable, self._stream = driver, executable, stream

    def launch(self) -> bool:
        """Launch it on its stream; False if the driver reports an error."""
        return _succeeded(self._driver, self._driver.cuGraphLaunch(self._executable, self._stream))

    def close(self) -> None:
        """Destroy the graph."""
        self._driver.cuGraphExecDestroy(self._executable)


def capture(stream: int, work: Callable[[], bool]) -> Graph | None:
    """Capture the work that `work` enqueues on a stream; None without cuda-python or if it cannot be captured."""
    driver = _driver()
    if driver is None:
        return None
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    if not _succeeded(driver, driver.cuStreamBeginCapture(stream, mode)):
        return None
    enqueued = captured = False
    try:
        enqueued = work()
    finally:
        error, graph = driver.cuStreamEndCapture(stream)
        captured = _succeeded(driver, (error,))
        if captured and not enqueued:
            driver.cuGraphDestroy(graph)
    if not (captured and enqueued):
        log.info("the engine cannot be captured as a CUDA graph; its kernels are launched one by one")
        return None
    error, executable = driver.cuGraphInstantiate(graph, 0)
    driver.cuGraphDestroy(graph)
    return Graph(driver, executable, stream) if _succeeded(driver, (error,)) else None


def _driver() -> Any | None:
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    return driver


def _succeeded(driver: Any, result: tuple[Any, ...]) -> bool:
    return bool(result[0] == driver.CUresult.CUDA_SUCCESS)
