"""TensorRT's Python package, and what a version of it has: the same code serves 10.3 to 11."""

from __future__ import annotations

from typing import Any

from pipeline.errors import HostError


def import_tensorrt() -> Any:
    """TensorRT's Python package.

    Raises:
        HostError: It is not installed, or its libraries do not load.
    """
    try:
        import tensorrt
    except (ImportError, OSError, RuntimeError) as error:
        raise HostError(
            "TensorRT is not here",
            found=f"{type(error).__name__}: {error}",
            fix="on a GPU host: pip install 'maskplan[tensorrt]'; finished stages can be copied there",
        ) from error
    return tensorrt


def member(owner: Any, name: str) -> Any | None:
    """What some versions have under a name and others have not; None where it is not there.

    Enumerations change their integers between versions, so members are always asked for by name. This is the only place
    that looks names up at run time, so that tests can hold every name in the sources against the real packages.
    """
    return getattr(owner, name, None)


def network_flags(trt: Any) -> int:
    """Creation flags of a strongly typed network: from 11 on every network is one, and the flag may go."""
    flag = member(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    return 0 if flag is None else 1 << int(flag)
