"""The comparison of two models' outputs as a Polygraphy command line, to repeat it with NVIDIA's own tool."""

from __future__ import annotations

import shlex
from pathlib import Path

from maskplan.engines.sidecar import read_engine, sidecar_path
from maskplan.engines.trt.versions import LIBRARIES
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import TensorSpec
from maskplan.pipeline.core.choices import GPU_BACKENDS
from maskplan.pipeline.core.errors import InputError

OUTPUTS = "dense_outputs.json"
"""File in the working directory to which the first command saves the dense model's outputs."""

_SEED = 1
# Uniform noise with the mean and variance of the normal noise that `compare` uses without images.
_RANGE = "[-1.732,1.732]"
_ITERATIONS = 32
_TOLERANCE = 0.1


def polygraphy_command(dense: Path, sparse: Path, shape: tuple[int, int, int] | None) -> str:
    """The `polygraphy run` commands that compare two models' outputs, as one line for a shell.

    The first command runs the dense model on noise and saves its outputs; the second runs the sparse model on the same
    noise, and checks the largest difference (`max_abs_diff` in the report) and for NaN and infinity. Polygraphy uses no
    labels: its verdict is about outputs only. `--atol` and `--rtol`, of which one must hold, fit two precisions of the
    same weights. Pruning changes outputs by more; `compare` measures what that costs in accuracy.

    All flags exist since Polygraphy 0.49.

    Args:
        dense: The reference: an ONNX file, an engine or a TensorRT plan with its sidecar.
        sparse: The model that is compared with it, of the same kinds.
        shape: Shape of one image, (channels, H, W); None takes what each file declares, and 1 for what is dynamic.

    Raises:
        InputError: A file is missing, damaged, a checkpoint or of an unknown kind, or its path contains a colon.
    """
    save = ["--save-outputs", OUTPUTS]
    load = ["--load-outputs", OUTPUTS, "--compare-func", "simple", "--check-error-stat", "max"]
    load += ["--atol", str(_TOLERANCE), "--rtol", str(_TOLERANCE)]
    return f"{shlex.join([*_run(dense, shape), *save])} && {shlex.join([*_run(sparse, shape), *load])}"


def _run(path: Path, shape: tuple[int, int, int] | None) -> list[str]:
    source, runner, environment = _source(path)
    if ":" in str(path):
        raise InputError(
            "Polygraphy cannot open a file whose path contains a colon",
            where=path,
            fix="rename the file, or give a path relative to its folder",
        )
    if not source.shape or len(source.shape) != 4:
        raise InputError("not an image model", where=path, found=f"input {source.name} {source.shape}")
    sizes = ",".join(str(d or 1) for d in (source.shape[0], *(shape or source.shape[1:])))
    # A name that begins with a dash would be parsed as an option.
    file = f"./{path}" if str(path).startswith("-") else str(path)
    noise = ["--seed", str(_SEED), "--val-range", _RANGE, "--iterations", str(_ITERATIONS)]
    return [
        *environment,
        "polygraphy",
        "run",
        file,
        *runner,
        "--input-shapes",
        f"{source.name}:[{sizes}]",
        *noise,
        "--validate",
    ]


def _source(path: Path) -> tuple[TensorSpec, list[str], tuple[str, ...]]:
    """A model's input, the flags that select its runner, and the environment that this needs."""
    environment: tuple[str, ...] = ()
    if path.suffix == ".plan" or (path.suffix == ".onnx" and sidecar_path(path).is_file()):
        record = read_engine(path)
        inputs = record.inputs
        runner = ["--trt", "--model-type", "engine"] if record.backend in GPU_BACKENDS else ["--onnxrt"]
        environment = LIBRARIES[record.backend].polygraphy if record.backend in GPU_BACKENDS else ()
    elif path.suffix == ".onnx":
        inputs, runner = describe_onnx(path).inputs, ["--onnxrt"]
    elif path.suffix == ".safetensors":
        raise InputError(
            "Polygraphy cannot run checkpoints",
            where=path,
            fix=f"export it first: maskplan export MODEL --weights {shlex.quote(str(path))} -o model.onnx",
        )
    else:
        raise InputError("Polygraphy cannot run this kind of file", where=path, fix="give an ONNX file or an engine")
    if len(inputs) != 1:
        raise InputError(
            "the model does not have exactly one input",
            where=path,
            found=", ".join(spec.name for spec in inputs) or "none",
            fix="give an image classifier",
        )
    return inputs[0], runner, environment
