"""Whether a plan can run on this host: the TensorRT and the GPU that it was built with, against those at hand."""

from __future__ import annotations

from maskplan.engines.trt.cuda import gpu
from maskplan.engines.trt.versions import import_tensorrt
from maskplan.pipeline.core.artifacts import EngineFile
from maskplan.pipeline.core.errors import HostError, InputError


def require_same_host(engine: EngineFile) -> None:
    """Raise unless the plan can run here; all that differs is told at once.

    Raises:
        HostError: TensorRT or a GPU is not here.
        InputError: The plan is of another TensorRT or for another GPU.
    """
    problems = _differences(engine)
    if problems:
        raise InputError(
            "the plan is not for this host",
            where=engine.path,
            found="; ".join(problems),
            fix="build it again on this host",
        )


def is_foreign(engine: EngineFile) -> bool:
    """Whether the plan surely cannot run here; a host without TensorRT or a GPU cannot tell."""
    try:
        return bool(_differences(engine))
    except HostError:
        return False


def _differences(engine: EngineFile) -> list[str]:
    trt, here = import_tensorrt(), gpu()
    problems = []
    version = str(trt.__version__)
    if version != engine.runtime_version and not engine.version_compatible:
        problems.append(f"built by TensorRT {engine.runtime_version}, here is {version}")
    capability = engine.compute_capability
    if capability not in (None, here.compute_capability) and not engine.hardware_compatible:
        problems.append(
            f"built for compute capability {capability} ({engine.device}), here is {here.compute_capability}"
        )
    return problems
