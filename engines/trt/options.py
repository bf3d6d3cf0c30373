"""Options of TensorRT builds, with their defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.validation import at_least

# Below this level the builder skips tactics, including sparse ones.
MIN_LEVEL_FOR_SPARSE = 3
MAX_LEVEL = 5

_TARGET = re.compile(r"sm[0-9]{2,3}")


@dataclass(frozen=True)
class TrtOptions:
    """Options of TensorRT builds.

    Attributes:
        tf32: Allow TF32 in FP32 layers.
        optimization_level: 0 to 5; below 3 the builder skips tactics, including sparse ones.
        workspace_bytes: Limit of scratch memory per tactic; all GPU memory by default.
        timing_cache: File of tactic timings, read before and updated after a build.
        timing_cache_wait_s: How long to wait if another process has locked the file, in seconds.
        version_compatible: The plan loads in later TensorRT versions too, at some loss of speed.
        hardware_compatible: The plan runs on Ampere GPUs and newer, not only on this model; some tactics are unavailable.
        refittable: Weights of the plan can be replaced.
        strip_plan: The plan contains no weights and must be refitted.
        targets: TensorRT-RTX only: kinds of GPUs that the plan runs on, such as `sm86`; by default all kinds from Ampere on
            that the version knows.
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
    targets: tuple[str, ...] = field(default=(), metadata={"omit_empty": True})

    def __post_init__(self) -> None:
        wrong = [target for target in self.targets if not _TARGET.fullmatch(target)]
        if wrong:
            fix = "write sm and the compute capability without its point, separated by commas: sm86,sm89,sm120"
            raise InputError("not a kind of GPU", found=listed(map(repr, wrong)), fix=fix)
        at_least(0, optimization_level=self.optimization_level, timing_cache_wait_s=self.timing_cache_wait_s)
        at_least(1, workspace_bytes=self.workspace_bytes)
        if self.optimization_level > MAX_LEVEL:
            raise InputError(f"optimization_level is {self.optimization_level}", fix=f"give 0 to {MAX_LEVEL}")

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The targets as compute capabilities: `8.6` for `sm86`."""
        return tuple(f"{target[2:-1]}.{target[-1]}" for target in self.targets)
