"""What differs between TensorRT and TensorRT-RTX, and between TensorRT's versions 10.3 to 11."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

from maskplan.engines.trt.log_capture import TrtLogCapture
from maskplan.pipeline.core.choices import TENSORRT, TENSORRT_RTX, Backend
from maskplan.pipeline.core.errors import HostError

_ALWAYS_STRONGLY_TYPED_MAJOR = 11


@dataclass(frozen=True)
class Library:
    """One of NVIDIA's two compilers, which share their Python API.

    Attributes:
        name: As NVIDIA writes it.
        package: Its Python package.
        min_version: The oldest version that is supported.
        how_to_install: The fix where it is missing.
        how_to_upgrade: The fix where it is too old.
        builds_on_gpu: Whether a build needs a GPU and its driver.
    """

    name: str
    package: str
    min_version: tuple[int, int]
    how_to_install: str
    how_to_upgrade: str
    builds_on_gpu: bool


LIBRARIES: dict[Backend, Library] = {
    TENSORRT: Library(
        name="TensorRT",
        package="tensorrt",
        min_version=(10, 3),
        how_to_install="on a GPU host: pip install 'maskplan[tensorrt]'; copy the output folder there, finished stages"
        " are reused",
        how_to_upgrade="pip install --upgrade tensorrt, in a separate environment",
        builds_on_gpu=True,
    ),
    TENSORRT_RTX: Library(
        name="TensorRT-RTX",
        package="tensorrt_rtx",
        min_version=(1, 4),
        how_to_install="pip install 'maskplan[rtx]'; it needs no GPU",
        how_to_upgrade="pip install --upgrade tensorrt-rtx-cu13",
        builds_on_gpu=False,
    ),
}


def import_library(backend: Backend) -> Any:
    """Import the Python package of TensorRT or TensorRT-RTX; nothing else imports either.

    Raises:
        HostError: It is not installed, its libraries do not load, or it is too old.
    """
    library = LIBRARIES[backend]
    try:
        trt = importlib.import_module(library.package)
        version = trt.__version__
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        raise HostError(
            f"{library.name} is not installed",
            found=f"{type(error).__name__}: {error}",
            fix=library.how_to_install,
        ) from error
    if _release(version) < library.min_version:
        raise HostError(
            f"{library.name} is too old",
            found=f"{library.name} {version}, required is {'.'.join(map(str, library.min_version))} or newer",
            fix=library.how_to_upgrade,
        )
    return trt


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
