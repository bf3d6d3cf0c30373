"""Whether a plan can run on this host: compare its TensorRT version and GPU with the installed ones."""

from __future__ import annotations

from maskplan.engines.trt.cuda import gpu
from maskplan.engines.trt.versions import import_library
from maskplan.pipeline.core.artifacts import EngineFile
from maskplan.pipeline.core.choices import TENSORRT
from maskplan.pipeline.core.errors import HostError, InputError


def require_compatible_host(engine: EngineFile) -> None:
    """Raise an error that lists every incompatibility if the plan cannot run on this host.

    Raises:
        HostError: TensorRT is not installed or there is no GPU.
        InputError: The plan was built with another TensorRT version or for another GPU.
    """
    problems = _incompatibilities(engine)
    if problems:
        raise InputError(
            "the plan was not built for this host",
            where=engine.path,
            found="; ".join(problems),
            fix="rebuild it on this host",
        )


def is_foreign(engine: EngineFile) -> bool:
    """Whether the plan is known not to run here; False on a host without TensorRT or a GPU."""
    try:
        return bool(_incompatibilities(engine))
    except HostError:
        return False


def _incompatibilities(engine: EngineFile) -> list[str]:
    trt, device = import_library(TENSORRT), gpu()
    problems = []
    version = str(trt.__version__)
    if version != engine.runtime_version and not engine.version_compatible:
        problems.append(f"built by TensorRT {engine.runtime_version}, installed is {version}")
    capability = engine.compute_capability
    if capability not in (None, device.compute_capability) and not engine.hardware_compatible:
        problems.append(
            f"built for compute capability {capability} ({engine.device}), this GPU has {device.compute_capability}"
        )
    return problems
