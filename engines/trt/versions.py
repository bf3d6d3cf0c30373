"""TensorRT's Python package, and what a version of it has: the same code serves 10.3 to 11."""

from __future__ import annotations

import re
from typing import Any

from maskplan.engines.trt.log import TrtLogCapture
from maskplan.pipeline.core.errors import HostError

OLDEST = (10, 3)
_STRONG_WITHOUT_FLAG = 11


def import_tensorrt() -> Any:
    """TensorRT's Python package.

    Raises:
        HostError: It is not installed, its libraries do not load, or it is older than 10.3.
    """
    try:
        import tensorrt

        version = tensorrt.__version__
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        raise HostError(
            "TensorRT is not here",
            found=f"{type(error).__name__}: {error}",
            fix="on a GPU host: pip install 'maskplan[tensorrt]'; finished stages can be copied there",
        ) from error
    if _release(version) < OLDEST:
        raise HostError(
            "TensorRT is too old",
            found=f"TensorRT {version}, needed is {'.'.join(map(str, OLDEST))} or newer",
            fix="pip install --upgrade tensorrt, in an environment of its own",
        )
    return tensorrt


def member(owner: Any, name: str) -> Any | None:
    """What some versions have under a name and others have not; None where it is not there.

    Enumerations change their integers between versions, so members are always asked for by name. This is the only place
    that looks names up at run time, so that tests can hold every name in the sources against the real packages.
    """
    return getattr(owner, name, None)


def network_flags(trt: Any) -> int:
    """Creation flags of a strongly typed network: from 11 on every network is one, and the flag may go.

    Raises:
        HostError: An older version that has no such flag.
    """
    flag = member(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    if flag is not None:
        return 1 << int(flag)
    if _release(trt.__version__) < (_STRONG_WITHOUT_FLAG, 0):
        raise HostError(
            "this TensorRT makes no strongly typed networks",
            found=f"TensorRT {trt.__version__} without the flag STRONGLY_TYPED",
            fix="install the package as NVIDIA publishes it, of 10.3 or newer",
        )
    return 0


def construct(kind: Any, log_capture: TrtLogCapture, *arguments: Any) -> Any:
    """A Builder, Runtime or OnnxParser, with our logger.

    Raises:
        HostError: TensorRT returns none, as without a driver; the bindings make an exception of it.
    """
    try:
        return kind(*arguments, log_capture.logger)
    except (TypeError, RuntimeError) as error:
        raise HostError(
            f"TensorRT makes no {kind.__name__} here",
            found=log_capture.why() if log_capture.errors or log_capture.warnings else str(error),
            fix="check that nvidia-smi sees a GPU and that the driver is recent enough for this TensorRT",
        ) from error


def _release(version: str) -> tuple[int, int]:
    """Major and minor; a version that cannot be read is taken for the oldest."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)
