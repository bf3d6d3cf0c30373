"""The stage that compiles the ONNX files with NVIDIA's compiler, where it is installed: TensorRT-RTX, which needs no GPU."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from maskplan.engines.build import profiles_for
from maskplan.engines.sidecar import has_sidecar, sidecar_path
from maskplan.engines.trt.compile import compile_onnx, installed_version
from maskplan.engines.trt.compile_process import Compiled
from maskplan.engines.trt.options import TrtOptions
from maskplan.pipeline.core.artifacts import OnnxModel
from maskplan.pipeline.core.choices import OFF, REQUIRED, TENSORRT_RTX, Backend
from maskplan.pipeline.core.compilation import CompileReport
from maskplan.pipeline.core.errors import PipelineError
from maskplan.pipeline.stages.job import Job

log = logging.getLogger(__name__)

_PLAN = "sparse.rtx.plan"


@dataclass(frozen=True)
class CompileOutcome:
    """Both verdicts, or why there are none; neither where the stage is turned off."""

    report: CompileReport | None = None
    reason: str | None = None


def compile_files(job: Job, backend: Backend, dense: OnnxModel, sparse: OnnxModel) -> CompileOutcome:
    """Compile the files that a GPU host builds from, and keep the sparse plan.

    Args:
        job: The run.
        backend: Of the run's engines; that of TensorRT-RTX already has the plan.
        dense: The dense model.
        sparse: The pruned model.

    Raises:
        PipelineError: The compiler is required, and is not installed, does not start or does not take an option.
    """
    if job.recipe.compile.mode == OFF:
        return CompileOutcome()
    plan = None if backend == TENSORRT_RTX else job.ws.path(_PLAN)
    try:
        report = CompileReport(
            _compile(job, "dense", dense, None, sparse_weights=False).result,
            _compile(job, "sparse", sparse, plan, sparse_weights=True).result,
        )
    except PipelineError as error:
        if job.recipe.compile.mode == REQUIRED:
            raise
        found = "" if error.found is None else f" ({error.found})"
        reason = f"{error.what}{found}; to see what NVIDIA's compiler makes of the ONNX files: {error.fix}"
        log.info("compile: left out: %s", reason)
        return CompileOutcome(reason=reason)
    for result in (report.dense, report.sparse):
        for problem in result.problems:
            log.warning("%s refuses %s: %s; %s", result.compiler, result.onnx, problem, problem.fix)
    return CompileOutcome(report)


def _compile(job: Job, name: str, model: OnnxModel, out: Path | None, *, sparse_weights: bool) -> Compiled:
    profiles = profiles_for(model, job.recipe.time.batches)
    recipe = job.recipe.tensorrt
    options = TrtOptions(tf32=recipe.tf32, workspace_bytes=recipe.workspace_bytes, targets=recipe.targets)
    inputs = {
        "onnx": model.sha256,
        "profiles": profiles,
        "options": options,
        "sparse_weights": sparse_weights,
        "kept": out is not None,
    }

    def work() -> Compiled:
        compiled = compile_onnx(model, profiles, sparse_weights=sparse_weights, options=options, out=out)
        if out is not None and not compiled.result.accepted:
            # Left by a run with other masks, whose file was accepted.
            out.unlink(missing_ok=True)
            sidecar_path(out).unlink(missing_ok=True)
        return compiled

    return job.ws.stage(f"compile-{name}", Compiled, inputs, work, intact=_is_current)


def _is_current(compiled: Compiled) -> bool:
    """Whether the plan has its sidecar, and the installed version, if there is one, is the one that compiled it."""
    if compiled.engine is not None and not has_sidecar(compiled.engine):
        return False
    return installed_version() in (None, compiled.result.version)
