"""The same build by NVIDIA's trtexec: its command lines, for hosts where only it may run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from maskplan.engines.trt.build import FP32_NOTE
from maskplan.engines.trt.options import TrtOptions
from maskplan.pipeline.core.artifacts import OnnxModel, Profile
from maskplan.pipeline.core.choices import FP32
from maskplan.pipeline.core.errors import InputError, listed

MAJORS = (10, 11)
_MIB = 2**20
# What 11 does by itself: graphs, spinning, a profile run of its own, and no copies in the timed runs.
_TIMING_OF_10 = ("--useCudaGraph", "--useSpinWait", "--separateProfileRun", "--noDataTransfers")


def trtexec_lines(
    onnx_model: OnnxModel,
    profiles: tuple[Profile, ...],
    sparse_weights: bool,
    options: TrtOptions,
    out: Path,
    major: int,
) -> list[str]:
    """Shell lines that build and time a plan for each profile, and write what `build --import` takes back.

    A plan is timed at the batch that it is tuned for, with the defaults of 11; on 10 they have to be asked for. One without
    weights is not timed. For an FP32 graph the warning of our own builder comes first, as a comment.

    Args:
        onnx_model: The graph.
        profiles: One plan each, for a command line of trtexec has one; all different.
        sparse_weights: Whether sparse kernels are allowed; never forced, which would overwrite weights.
        options: As of the builder.
        out: The plan; with several profiles the tuned batch goes into the names.
        major: TensorRT's major version, 10 or 11.

    Raises:
        InputError: As of `require_fitting`.
    """
    require_fitting(onnx_model, profiles)
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
    for asked, flag in (
        (options.version_compatible, "--versionCompatible"),
        (options.hardware_compatible, "--hardwareCompatibilityLevel=ampere+"),
        # Alone, the second lets a plan be refitted with the same weights only; with the first, with any.
        (options.refittable, "--refit"),
        (options.strip_plan, "--stripWeights"),
    ):
        if asked:
            common.append(flag)
    timing = ["--skipInference"] if options.strip_plan else [] if major >= 11 else list(_TIMING_OF_10)
    lines = [f"# {FP32_NOTE}"] if sparse_weights and onnx_model.precision == FP32 else []
    for profile in profiles:
        plan = out if len(profiles) == 1 else out.with_name(f"{out.stem}.{label_of(profile, profiles)}{out.suffix}")
        files = [f"--onnx={onnx_model.path}", f"--saveEngine={plan}", f"--exportLayerInfo={plan}.layers.json"]
        lines.append(shlex.join(["trtexec", *files, *_shapes(onnx_model, profile), *common, *timing]))
    return lines


def label_of(profile: Profile, profiles: Sequence[Profile]) -> str:
    """What tells a profile from the others in a file's name: the tuned batch, or all three where that is not enough."""
    is_alone = [other.opt for other in profiles].count(profile.opt) == 1
    return f"b{profile.opt}" if is_alone else f"b{profile.min}-{profile.opt}-{profile.max}"


def require_fitting(onnx_model: OnnxModel, profiles: Sequence[Profile]) -> None:
    """Raise unless profiles say all that the graph leaves open, and nothing that it does not.

    Raises:
        InputError: Another dimension than the batch is dynamic, or a profile has batches that the graph does not take.
    """
    problems = []
    for spec in onnx_model.inputs:
        if any(d is None for d in spec.shape[1:]):
            problems.append(f"{spec.name} is {spec.shape}: only the batch may be dynamic")
        batch = spec.shape[0] if spec.shape else None
        if batch is not None and (wrong := [p for p in profiles if p != Profile(batch, batch, batch)]):
            problems.append(f"{spec.name} has a fixed batch of {batch}, not {listed(wrong)}")
    if problems:
        raise InputError(
            "TensorRT cannot build the graph for these shapes",
            where=onnx_model.path,
            found="; ".join(problems),
            fix="export with fixed image sizes; leave --profile out where the batch is fixed",
        )


def _shapes(onnx_model: OnnxModel, profile: Profile) -> list[str]:
    """Shapes of a dynamic graph; one of a fixed batch must not be given any."""
    dynamic = [spec for spec in onnx_model.inputs if spec.shape and spec.shape[0] is None]
    options = []
    for name, batch in (("min", profile.min), ("opt", profile.opt), ("max", profile.max)):
        shapes = [f"{s.name}:{'x'.join(map(str, (batch, *s.shape[1:])))}" for s in dynamic]
        if shapes:
            options.append(f"--{name}Shapes={','.join(shapes)}")
    return options
