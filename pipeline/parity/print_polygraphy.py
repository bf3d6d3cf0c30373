"""The comparison of two models' outputs as a command line of Polygraphy, for who wants to see it from NVIDIA's own tool."""

from __future__ import annotations

import shlex
from pathlib import Path

from maskplan.engines.sidecar import read_engine, sidecar_path
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import TensorSpec
from maskplan.pipeline.core.choices import TENSORRT
from maskplan.pipeline.core.errors import InputError

OUTPUTS = "dense_outputs.json"
"""Where the first half of the command leaves the dense model's outputs, in the folder that it runs in."""

_SEED = 1
# Uniform noise of the mean and variance of the normal noise that `compare` takes where it has no images.
_RANGE = "[-1.732,1.732]"
_ITERATIONS = 32
_TOLERANCE = 0.1


def polygraphy_command(dense: Path, sparse: Path, shape: tuple[int, int, int]) -> str:
    """The `polygraphy run` commands that compare two models' outputs, as one line for a shell.

    The first runs the dense model on noise and saves what comes out, the second runs the sparse one on the same noise and
    looks at the largest difference, `max_abs_diff` in our report, and for NaN and infinity. Polygraphy knows no labels, so
    its verdict is on outputs alone: `--atol` and `--rtol`, of which one must hold, are what two precisions of the same
    weights keep to. Pruning shifts outputs by more; what that costs in accuracy is for `compare` to say.

    Only flags that Polygraphy has had since 0.49 are used.

    Args:
        dense: The reference: an ONNX file, an engine or a TensorRT plan with its sidecar.
        sparse: What is compared with it, likewise.
        shape: Of one image, (channels, H, W).

    Raises:
        InputError: A file is missing, damaged, a checkpoint, or of no known kind, or its name has a colon in it.
    """
    save = ["--save-outputs", OUTPUTS]
    load = ["--load-outputs", OUTPUTS, "--compare-func", "simple", "--check-error-stat", "max"]
    load += ["--atol", str(_TOLERANCE), "--rtol", str(_TOLERANCE)]
    return f"{shlex.join([*_run(dense, shape), *save])} && {shlex.join([*_run(sparse, shape), *load])}"


def _run(path: Path, shape: tuple[int, int, int]) -> list[str]:
    source, runner = _source(path)
    if ":" in str(path):
        raise InputError(
            "Polygraphy does not open files with a colon in their path",
            where=path,
            fix="rename the file, or give its path from its own folder",
        )
    if not source.shape or len(source.shape) != 4:
        raise InputError("not a model of images", where=path, found=f"input {source.name} {source.shape}")
    sizes = ",".join(str(d) for d in (source.shape[0] or 1, *shape))
    # A name that begins like an option would be taken for one.
    file = f"./{path}" if str(path).startswith("-") else str(path)
    noise = ["--seed", str(_SEED), "--val-range", _RANGE, "--iterations", str(_ITERATIONS)]
    return ["polygraphy", "run", file, *runner, "--input-shapes", f"{source.name}:[{sizes}]", *noise, "--validate"]


def _source(path: Path) -> tuple[TensorSpec, list[str]]:
    """A model's input, and the flags that say what runs it."""
    if path.suffix == ".plan" or (path.suffix == ".onnx" and sidecar_path(path).is_file()):
        record = read_engine(path)
        inputs = record.inputs
        runner = ["--trt", "--model-type", "engine"] if record.backend == TENSORRT else ["--onnxrt"]
    elif path.suffix == ".onnx":
        inputs, runner = describe_onnx(path).inputs, ["--onnxrt"]
    elif path.suffix == ".safetensors":
        raise InputError(
            "Polygraphy does not run checkpoints",
            where=path,
            fix=f"export it first: maskplan export MODEL --weights {shlex.quote(str(path))} -o model.onnx",
        )
    else:
        raise InputError("not something that Polygraphy runs", where=path, fix="give an ONNX file or an engine")
    if len(inputs) != 1:
        raise InputError(
            "not a model of one input",
            where=path,
            found=", ".join(spec.name for spec in inputs) or "none",
            fix="give an image classifier",
        )
    return inputs[0], runner
