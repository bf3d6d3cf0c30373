"""Forward TensorRT's log to Python's, and capture its errors, warnings, sparsity messages and lists of layers."""

from __future__ import annotations

import functools
import logging
import re
import threading
import weakref
from typing import Any

from maskplan.engines.trt.layers import is_layer_list
from maskplan.engines.trt.versions import library_of

log = logging.getLogger(__name__)

_MAX_QUOTED = 5
_SPARSITY = "(Sparsity)"
_OUT_OF_MEMORY = re.compile(
    r"out[ _]?of[ _]?memory|memory allocation|insufficient (?:\w+ )?(?:memory|workspace)|memory is insufficient"
    r"|could not be allocated|cuda (?:initialization )?(?:failure|error)\D{0,20}2\b",
    re.IGNORECASE,
)
_NO_DRIVER = re.compile(r"\(cudaError 35: ")

_LISTENERS: weakref.WeakSet[TrtLogCapture] = weakref.WeakSet()
# Reentrant: while a thread holds it, the garbage collector may free a TensorRT object, which logs.
_LOCK = threading.RLock()


class TrtLogCapture:
    """Captures the messages of TensorRT in this process until `stop`, or for the lifetime of the object.

    Attributes:
        errors: Messages with severity error or internal error, in order.
        warnings: Messages with severity warning; some versions report CUDA failures this way.
        sparsity: Messages about sparse layers.
        layer_lists: Messages that list the layers of a finished engine, which TensorRT-RTX's builder writes.
        library: Which of the two libraries.
        quiet: Warnings are not shown: the work repeats what was done before.
        logger: The logger to pass to TensorRT's constructors.
    """

    def __init__(self, trt: Any, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.sparsity: list[str] = []
        self.layer_lists: list[str] = []
        self.library = library_of(trt)
        self.logger = _logger(trt)
        with _LOCK:
            _LISTENERS.add(self)

    def stop(self) -> None:
        """Capture no further messages."""
        with _LOCK:
            _LISTENERS.discard(self)

    def reason(self) -> str:
        """The last errors, or the last warnings if there are no errors, to quote in an error message.

        A build without a GPU also logs that there is no driver, which is no reason for its failure where there is another.
        """
        worst = self._worst()
        others = (
            [message for message in worst if not _NO_DRIVER.search(message)] if not self.library.builds_on_gpu else []
        )
        return "; ".join((others or worst)[-_MAX_QUOTED:]) or f"{self.library.name} gave no reason"

    def is_out_of_memory(self) -> bool:
        """Whether one of these messages reports insufficient memory."""
        return any(_OUT_OF_MEMORY.search(message) for message in self._worst())

    def _worst(self) -> list[str]:
        return self.errors or self.warnings


@functools.cache
def _logger(trt: Any) -> Any:
    """The only logger: TensorRT uses the first one that it gets for the whole process and ignores later ones."""
    name = library_of(trt).name
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
            with _LOCK:
                listeners = tuple(_LISTENERS)
            # Errors are quoted by the exception that follows; where none does, the parser only tried something. A warning
            # may come for each layer, and again from each build.
            is_repeated = any(capture.quiet or msg in capture.warnings for capture in listeners)
            shown = logging.DEBUG if level == logging.ERROR or is_repeated else level
            log.log(shown, "%s: %s", name, msg.strip())
            for log_capture in listeners:
                if level == logging.ERROR:
                    log_capture.errors.append(msg)
                elif level == logging.WARNING:
                    log_capture.warnings.append(msg)
                if _SPARSITY in msg:
                    log_capture.sparsity.append(msg)
                if is_layer_list(msg):
                    log_capture.layer_lists.append(msg)

    return Logger()
