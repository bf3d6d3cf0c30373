"""Whether a plan can run on this host: compare its library's version and its GPU with those here."""

from __future__ import annotations

from maskplan.engines.trt.cuda import Gpu, gpu, has_driver
from maskplan.engines.trt.versions import LIBRARIES, import_library
from maskplan.pipeline.core.artifacts import EngineFile
from maskplan.pipeline.core.errors import HostError, InputError


def require_compatible_host(engine: EngineFile) -> None:
    """Raise an error that lists every incompatibility if the plan cannot run on this host.

    Raises:
        HostError: The library is not installed or there is no GPU.
        InputError: The plan was built with another version or for another GPU.
    """
    if not can_run_plans(engine):
        raise HostError(
            f"a plan of {LIBRARIES[engine.backend].name} runs on a GPU only",
            where=engine.path,
            found="no NVIDIA driver on this host",
            fix="use a host with an RTX GPU; here, run the ONNX file that the plan was built from",
        )
    problems = _incompatibilities(engine, gpu())
    if problems:
        raise InputError(
            "the plan was not built for this host",
            where=engine.path,
            found="; ".join(problems),
            fix="rebuild it on this host",
        )


def can_run_plans(engine: EngineFile) -> bool:
    """Whether plans of this library could run here: those whose build needs no GPU are also built where none can."""
    return LIBRARIES[engine.backend].builds_on_gpu or has_driver()


def is_foreign(engine: EngineFile) -> bool:
    """Whether the plan is known not to run here; False on a host without the library or a GPU that it needs."""
    try:
        return bool(_incompatibilities(engine, gpu() if can_run_plans(engine) else None))
    except HostError:
        return False


def _incompatibilities(engine: EngineFile, device: Gpu | None) -> list[str]:
    trt, library = import_library(engine.backend), LIBRARIES[engine.backend]
    problems = []
    version = str(trt.__version__)
    if version != engine.runtime_version and not engine.version_compatible:
        problems.append(f"built by {library.name} {engine.runtime_version}, installed is {version}")
    if device is None:
        return problems
    here = device.compute_capability
    if engine.targets and f"sm{here.replace('.', '')}" not in engine.targets:
        problems.append(f"built for {', '.join(engine.targets)}, this GPU has compute capability {here}")
    capability = engine.compute_capability
    if capability not in (None, here) and not engine.hardware_compatible:
        problems.append(f"built for compute capability {capability} ({engine.device}), this GPU has {here}")
    return problems
