"""TensorRT's log through Python's, with what a build says of sparsity and its errors kept."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)

_KEPT_ERRORS = 5


class Heard:
    """What TensorRT said while it worked.

    Attributes:
        errors: Messages of the severities error and internal error, in order.
        sparsity: Lines that speak of sparse layers.
        logger: For TensorRT's constructors; it must live as long as what they make.
    """

    def __init__(self, trt: Any) -> None:
        self.errors: list[str] = []
        self.sparsity: list[str] = []
        heard = self
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
                if level == logging.ERROR:
                    heard.errors.append(msg)
                if "(Sparsity)" in msg:
                    heard.sparsity.append(msg)

        self.logger = Logger()

    def why(self) -> str:
        """The last errors, for a message of ours."""
        return "; ".join(self.errors[-_KEPT_ERRORS:]) or "TensorRT gave no reason"

    def is_out_of_memory(self) -> bool:
        """Whether an error speaks of memory that could not be had."""
        text = " ".join(self.errors).lower()
        return any(sign in text for sign in ("out of memory", "outofmemory", "out_of_memory", "memory allocation"))
