"""NVIDIA's Polygraphy as a command line for the same build, to repeat it with its own tool."""

from __future__ import annotations

import shlex
from pathlib import Path

from maskplan.engines.trt.options import TrtOptions
from maskplan.engines.trt.shapes import dynamic_inputs, require_compatible_shapes, shapes_of
from maskplan.engines.trt.versions import LIBRARIES, require_supported
from maskplan.pipeline.core.artifacts import OnnxModel, Profile
from maskplan.pipeline.core.choices import TENSORRT_RTX, Backend
from maskplan.pipeline.core.errors import InputError

# Polygraphy 0.53 does not pass on `--tf32` to TensorRT-RTX, whose own default is on.
_TF32_STAYS_ON = "# Polygraphy leaves TF32 on for TensorRT-RTX: its plan has the bytes of a build with --tf32"


def polygraphy_lines(
    onnx_model: OnnxModel,
    profiles: tuple[Profile, ...],
    sparse_weights: bool,
    options: TrtOptions,
    out: Path,
    backend: Backend,
) -> list[str]:
    """The `polygraphy convert` line that builds the same plan, below a comment where it cannot be the same.

    All flags exist since Polygraphy 0.49.26, those of TensorRT-RTX since 0.53.

    Args:
        onnx_model: The graph.
        profiles: One optimization profile each, if the batch is dynamic.
        sparse_weights: Set the sparse flag.
        options: The other options.
        out: The plan to write.
        backend: `tensorrt` or `tensorrt-rtx`.

    Raises:
        InputError: The library does not take an option, the profiles do not match the graph, or a path contains a colon.
    """
    require_supported(backend, options)
    require_compatible_shapes(onnx_model, profiles)
    if ":" in f"{onnx_model.path}{out}":
        raise InputError(
            "Polygraphy cannot open a file whose path contains a colon",
            where=onnx_model.path,
            fix="rename it, or give a path relative to its folder",
        )
    words = [*LIBRARIES[backend].polygraphy, "polygraphy", "convert", _as_file(onnx_model.path), "--convert-to", "trt"]
    for profile in profiles:
        words += _shapes(onnx_model, profile)
    words += ["--strongly-typed", "--profiling-verbosity", "detailed"]
    words += ["--builder-optimization-level", str(options.optimization_level)]
    for enabled, flags in (
        (sparse_weights, ("--sparse-weights",)),
        (options.tf32, ("--tf32",)),
        (options.workspace_bytes is not None, ("--pool-limit", f"workspace:{options.workspace_bytes}")),
        (options.timing_cache is not None, ("--load-timing-cache", f"{options.timing_cache}")),
        (options.timing_cache is not None, ("--save-timing-cache", f"{options.timing_cache}")),
        (options.version_compatible, ("--version-compatible",)),
        (options.hardware_compatible, ("--hardware-compatibility-level", "ampere_plus")),
        (options.refittable, ("--refittable",)),
        (options.strip_plan, ("--strip-plan",)),
        (bool(options.targets), ("--compute-capabilities", *options.capabilities)),
    ):
        words += flags if enabled else ()
    line = shlex.join([*words, "--output", _as_file(out)])
    return [_TF32_STAYS_ON, line] if backend == TENSORRT_RTX and not options.tf32 else [line]


def _shapes(onnx_model: OnnxModel, profile: Profile) -> list[str]:
    """Shapes of the inputs with dynamic sizes."""
    dynamic = {spec.name: shapes_of(onnx_model, spec, profile) for spec in dynamic_inputs(onnx_model)}
    words = []
    for i, kind in enumerate(("min", "opt", "max")):
        shapes = [f"{name}:[{','.join(map(str, found[i]))}]" for name, found in dynamic.items()]
        words += [f"--trt-{kind}-shapes", *shapes] if shapes else []
    return words


def _as_file(path: Path) -> str:
    """A name that begins with a dash would be parsed as an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)
