"""The same build by NVIDIA's trtexec: its command lines, for hosts where only it may run."""

from __future__ import annotations

import shlex
from pathlib import Path

from engines.trt.options import TrtOptions
from pipeline.artifacts import OnnxModel, Profile

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

    A plan is timed at the batch that it is tuned for, with the defaults of 11; on 10 they have to be asked for.

    Args:
        onnx_model: The graph.
        profiles: One plan each: a command line of trtexec has one.
        sparse_weights: Whether sparse kernels are allowed; never forced, which would overwrite weights.
        options: As of the builder.
        out: The plan; with several profiles the tuned batch goes into the names.
        major: TensorRT's major version, 10 or 11.
    """
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
        (options.refittable, "--refit"),
        (options.stripped, "--stripWeights"),
    ):
        if asked:
            common.append(flag)
    timing = [] if major >= 11 else list(_TIMING_OF_10)
    lines = []
    for profile in profiles:
        plan = out if len(profiles) == 1 else out.with_name(f"{out.stem}.b{profile.opt}{out.suffix}")
        files = [f"--onnx={onnx_model.path}", f"--saveEngine={plan}", f"--exportLayerInfo={plan}.layers.json"]
        lines.append(shlex.join(["trtexec", *files, *_shapes(onnx_model, profile), *common, *timing]))
    return lines


def _shapes(onnx_model: OnnxModel, profile: Profile) -> list[str]:
    """Shapes of a dynamic graph; one of a fixed batch must not be given any."""
    dynamic = [spec for spec in onnx_model.inputs if spec.shape and spec.shape[0] is None]
    options = []
    for name, batch in (("min", profile.min), ("opt", profile.opt), ("max", profile.max)):
        shapes = [f"{s.name}:{'x'.join(map(str, (batch, *s.shape[1:])))}" for s in dynamic]
        if shapes:
            options.append(f"--{name}Shapes={','.join(shapes)}")
    return options
