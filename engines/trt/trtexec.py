"""Command lines of NVIDIA's trtexec for the same build, for hosts where only trtexec may run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from maskplan.engines.trt.build import FP32_NOTE
from maskplan.engines.trt.options import TrtOptions
from maskplan.engines.trt.shapes import dynamic_inputs, require_compatible_shapes, shapes_of
from maskplan.pipeline.core.artifacts import OnnxModel, Profile
from maskplan.pipeline.core.choices import FP32

MAJORS = (10, 11)
_MIB = 2**20
# Defaults of trtexec 11: CUDA graphs, spin wait, a separate profile run, no copies in the timed runs.
_TIMING_OF_10 = ("--useCudaGraph", "--useSpinWait", "--separateProfileRun", "--noDataTransfers")


def trtexec_lines(
    onnx_model: OnnxModel,
    profiles: tuple[Profile, ...],
    sparse_weights: bool,
    options: TrtOptions,
    out: Path,
    major: int,
) -> list[str]:
    """Shell lines that build and time one plan per profile, and write the files that `build --import` reads.

    A plan is timed at the batch for which it is tuned, with the defaults of trtexec 11, which 10 needs as options. A plan
    without weights is not timed. For an FP32 graph the first line is the builder's warning as a comment.

    Args:
        onnx_model: The graph.
        profiles: One plan each, since trtexec supports one profile per command; all different.
        sparse_weights: Whether sparse kernels are allowed (never forced, which would overwrite weights).
        options: The builder's options.
        out: The plan; with several profiles their names contain the tuned batch.
        major: TensorRT's major version, 10 or 11.

    Raises:
        InputError: See `require_compatible_shapes`.
    """
    require_compatible_shapes(onnx_model, profiles)
    common = ["--sparsity=enable" if sparse_weights else "--sparsity=disable"]
    if major < 11:
        common.append("--stronglyTyped")
    if not options.tf32:
        common.append("--noTF32")
    common += [f"--builderOptimizationLevel={options.optimization_level}", "--profilingVerbosity=detailed"]
    if options.workspace_bytes is not None:
        common.append(f"--memPoolSize=workspace:{options.workspace_bytes / _MIB:g}M")
    if options.timing_cache is not None:
        common.append(f"--timingCacheFile={options.timing_cache}")
    for enabled, flag in (
        (options.version_compatible, "--versionCompatible"),
        (options.hardware_compatible, "--hardwareCompatibilityLevel=ampere+"),
        # A plan with --stripWeights alone can be refitted with the same weights only; with --refit, with any.
        (options.refittable, "--refit"),
        (options.strip_plan, "--stripWeights"),
    ):
        if enabled:
            common.append(flag)
    timing = ["--skipInference"] if options.strip_plan else [] if major >= 11 else list(_TIMING_OF_10)
    lines = [f"# {FP32_NOTE}"] if sparse_weights and onnx_model.precision == FP32 else []
    for profile in profiles:
        plan = (
            out if len(profiles) == 1 else out.with_name(f"{out.stem}.{profile_label(profile, profiles)}{out.suffix}")
        )
        files = [f"--onnx={onnx_model.path}", f"--saveEngine={plan}", f"--exportLayerInfo={plan}.layers.json"]
        lines.append(shlex.join(["trtexec", *files, *_shapes(onnx_model, profile), *common, *timing]))
    return lines


def profile_label(profile: Profile, profiles: Sequence[Profile]) -> str:
    """A unique label of a profile for file names: the tuned batch, all three sizes, or these with a number."""
    same = [other for other in profiles if other.opt == profile.opt]
    if len(same) == 1:
        return f"b{profile.opt}"
    same = [other for other in same if (other.min, other.max) == (profile.min, profile.max)]
    label = f"b{profile.min}-{profile.opt}-{profile.max}"
    return label if len(same) == 1 else f"{label}.{same.index(profile)}"


def _shapes(onnx_model: OnnxModel, profile: Profile) -> list[str]:
    """Shape options of the inputs with dynamic sizes; trtexec rejects them for others."""
    dynamic = {spec.name: shapes_of(onnx_model, spec, profile) for spec in dynamic_inputs(onnx_model)}
    options = []
    for i, kind in enumerate(("min", "opt", "max")):
        shapes = [f"{name}:{'x'.join(map(str, found[i]))}" for name, found in dynamic.items()]
        if shapes:
            options.append(f"--{kind}Shapes={','.join(shapes)}")
    return options
