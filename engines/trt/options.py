"""How TensorRT builds: one frozen record, with the defaults that we use ourselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.validation import at_least

# Below it the builder leaves out tactics, sparse ones among them.
LEAST_LEVEL_FOR_SPARSE = 3
HIGHEST_LEVEL = 5


@dataclass(frozen=True)
class TrtOptions:
    """How TensorRT builds.

    Attributes:
        tf32: Let FP32 layers round their inputs to TF32.
        optimization_level: 0 to 5; below 3 tactics are left out, and with them sparse ones.
        workspace_bytes: Scratch memory that a tactic may take; all of the GPU's by default.
        timing_cache: File of measurements to begin with and to add to.
        timing_cache_wait_s: How long to wait for a process that holds it.
        version_compatible: The plan loads in later TensorRT versions too, at some cost in speed.
        hardware_compatible: The plan runs on Ampere GPUs and newer, not only on this kind; tactics may be lost.
        refittable: Weights can be changed in the plan.
        strip_plan: The plan is without weights, which are to be refitted.
    """

    RENAMED_FIELDS: ClassVar[Mapping[str, str]] = {"stripped": "strip_plan"}

    tf32: bool = False
    optimization_level: int = 3
    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    timing_cache_wait_s: float = 60.0
    version_compatible: bool = False
    hardware_compatible: bool = False
    refittable: bool = False
    strip_plan: bool = False

    def __post_init__(self) -> None:
        at_least(0, optimization_level=self.optimization_level, timing_cache_wait_s=self.timing_cache_wait_s)
        at_least(1, workspace_bytes=self.workspace_bytes)
        if self.optimization_level > HIGHEST_LEVEL:
            raise InputError(f"optimization_level is {self.optimization_level}", fix=f"give 0 to {HIGHEST_LEVEL}")
