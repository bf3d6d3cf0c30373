"""What a run found, and where its report was written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from maskplan.pipeline.core.artifacts import EngineFile, MaskSet, Provenance
from maskplan.pipeline.core.choices import Backend
from maskplan.pipeline.core.compilation import CompileReport
from maskplan.pipeline.core.refinement import Refinement
from maskplan.pipeline.core.reports import (
    CalibrationReport,
    ConformanceReport,
    DepthReport,
    Fidelity,
    ParityReport,
    TimingReport,
)
from maskplan.pipeline.masking.statistics import MaskStatistics
from maskplan.pipeline.permutation.record import Permuted
from maskplan.pipeline.recipe import Recipe


@dataclass(frozen=True)
class RunReport:
    """All that a run found; what has a default may not have been asked for.

    Attributes:
        model: The pruned checkpoint's record.
        backend_reason: Why this backend.
        fidelity: Of the sparse engine; None if its plan did not run.
        permutation: How channels were ordered before the masks were chosen.
        permutation_reason: Why a permutation that was asked for was not done.
        depth: How far each layer of the sparse model departs from the dense one.
        mask_statistics: Of the masks in `masks`, against magnitude masks of the same weights.
        command: As `as_typed` gives it.
        compile: What NVIDIA's compiler made of the ONNX files.
        compile_reason: Why it was not asked, where that was not turned off.
        stand_in: Backend that ran for accuracy and times in place of the engines, where their plans did not run.
    """

    model: Provenance
    precision: str
    backend_reason: str
    seed: int
    recipe: Recipe
    masks: MaskSet
    conformance: ConformanceReport
    engine: EngineFile
    dense_engine: EngineFile
    fidelity: Fidelity | None
    parity: ParityReport
    timing: TimingReport
    refine: Refinement | None = None
    calibration: CalibrationReport | None = None
    permutation: Permuted | None = None
    permutation_reason: str | None = None
    depth: DepthReport | None = None
    mask_statistics: MaskStatistics | None = None
    command: str = ""
    compile: CompileReport | None = None
    compile_reason: str | None = None
    stand_in: Backend | None = None

    @property
    def ran_on(self) -> Backend:
        """Backend that ran for accuracy and times."""
        return self.stand_in or self.engine.backend


@dataclass(frozen=True)
class ReportFile:
    """One file of the report."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class ReportFiles:
    """The files of the report."""

    json: ReportFile
    html: ReportFile
