"""TensorRT's Python package and the differences between its versions 10.3 to 11."""

from __future__ import annotations

import re
from typing import Any

from maskplan.engines.trt.log_capture import TrtLogCapture
from maskplan.pipeline.core.errors import HostError

MIN_VERSION = (10, 3)
_ALWAYS_STRONGLY_TYPED_MAJOR = 11


def import_tensorrt() -> Any:
    """Import TensorRT's Python package.

    Raises:
        HostError: It is not installed, its libraries do not load, or it is older than 10.3.
    """
    try:
        import tensorrt

        version = tensorrt.__version__
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        raise HostError(
            "TensorRT is not installed",
            found=f"{type(error).__name__}: {error}",
            fix="on a GPU host: pip install 'maskplan[tensorrt]'; copy the output folder there to reuse finished stages",
        ) from error
    if _release(version) < MIN_VERSION:
        raise HostError(
            "TensorRT is too old",
            found=f"TensorRT {version}, required is {'.'.join(map(str, MIN_VERSION))} or newer",
            fix="pip install --upgrade tensorrt, in a separate environment",
        )
    return tensorrt


def member(owner: Any, name: str) -> Any | None:
    """Get a member that only some versions have; None if it is missing.

    Enumerations change their integers between versions, so members are always looked up by name. Only this function looks
    up names at run time, so that tests can check every name in the sources against the real packages.
    """
    return getattr(owner, name, None)


def network_flags(trt: Any) -> int:
    """Creation flags of a strongly typed network; from version 11 on every network is, and the flag may be missing.

    Raises:
        HostError: An older version without the flag.
    """
    flag = member(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    if flag is not None:
        return 1 << int(flag)
    if _release(trt.__version__) < (_ALWAYS_STRONGLY_TYPED_MAJOR, 0):
        raise HostError(
            "this TensorRT does not support strongly typed networks",
            found=f"TensorRT {trt.__version__} without the flag STRONGLY_TYPED",
            fix="install NVIDIA's package, version 10.3 or newer",
        )
    return 0


def construct(kind: Any, log_capture: TrtLogCapture, *arguments: Any) -> Any:
    """Construct a Builder, Runtime or OnnxParser with the capturing logger.

    Raises:
        HostError: TensorRT returns null, for example without a driver, which the bindings turn into an exception.
    """
    try:
        return kind(*arguments, log_capture.logger)
    except (TypeError, RuntimeError) as error:
        raise HostError(
            f"TensorRT failed to create a {kind.__name__}",
            found=log_capture.reason() if log_capture.errors or log_capture.warnings else str(error),
            fix="check that nvidia-smi lists a GPU and that the driver is recent enough for this TensorRT",
        ) from error


def _release(version: str) -> tuple[int, int]:
    """Major and minor version; (0, 0) if the version cannot be parsed."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)
