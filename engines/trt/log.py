"""TensorRT's log through Python's, with what a build says of sparsity, its warnings and its errors kept."""

from __future__ import annotations

import functools
import logging
import re
import threading
import weakref
from typing import Any

log = logging.getLogger(__name__)

_KEPT = 5
_SPARSITY = "(Sparsity)"
_OUT_OF_MEMORY = re.compile(
    r"out[ _]?of[ _]?memory|memory allocation|insufficient (?:\w+ )?(?:memory|workspace)|memory is insufficient"
    r"|could not be allocated|cuda (?:initialization )?(?:failure|error)\D{0,20}2\b",
    re.IGNORECASE,
)

_LISTENERS: weakref.WeakSet[TrtLogCapture] = weakref.WeakSet()
# A thread that holds it may free, at the collector's bidding, an object of TensorRT that logs.
_LOCK = threading.RLock()


class TrtLogCapture:
    """What TensorRT says in this process from now on, for as long as this lives.

    Attributes:
        errors: Messages of the severities error and internal error, in order.
        warnings: Those of the severity warning; some versions tell failures of CUDA as such.
        sparsity: Lines that speak of sparse layers.
        logger: For TensorRT's constructors.
    """

    def __init__(self, trt: Any) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.sparsity: list[str] = []
        self.logger = _logger(trt)
        with _LOCK:
            _LISTENERS.add(self)

    def why(self) -> str:
        """The last errors, or warnings where there are none, for a message of ours."""
        return "; ".join(self._worst()[-_KEPT:]) or "TensorRT gave no reason"

    def is_out_of_memory(self) -> bool:
        """Whether one of those speaks of memory that could not be had."""
        return any(_OUT_OF_MEMORY.search(message) for message in self._worst())

    def _worst(self) -> list[str]:
        return self.errors or self.warnings


@functools.cache
def _logger(trt: Any) -> Any:
    """The one logger: TensorRT keeps the first that it is given for the whole process, and hands others' messages to it."""
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.WARNING,
        trt.ILogger.INFO: logging.DEBUG,
        trt.ILogger.VERBOSE: logging.DEBUG,
    }

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            log.log(level, "TensorRT: %s", msg)
            with _LOCK:
                listeners = tuple(_LISTENERS)
            for log_capture in listeners:
                if level == logging.ERROR:
                    log_capture.errors.append(msg)
                elif level == logging.WARNING:
                    log_capture.warnings.append(msg)
                if _SPARSITY in msg:
                    log_capture.sparsity.append(msg)

    return Logger()
