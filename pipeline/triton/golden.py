"""A golden input and output next to a deployed engine, which `serve-check` compares a server's output with."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from maskplan.engines.build import open_engine
from maskplan.pipeline.core.artifacts import EngineFile, TensorSpec
from maskplan.pipeline.core.errors import InputError, PipelineError
from maskplan.pipeline.triton.config import max_batch_size

Golden = tuple[npt.NDArray[Any], npt.NDArray[Any]]

FOLDER = "golden"
# Shares of the largest output. The server's GPU or its release of ONNX Runtime may choose other kernels.
_TOLERANCES = {"fp32": 1e-3, "fp16": 5e-2}
_OTHER_TOLERANCE = 1e-1


def golden_pair(engine: EngineFile, seed: int = 0) -> Golden:
    """Run an engine once on a seeded input: one image, or as many as the graph's fixed batch.

    Raises:
        InputError: The engine cannot be loaded on this host, does not have exactly one float input of known shape and one
            output, or its output is not finite.
        HostError: Its runtime is not installed.
    """
    _require_one_in_and_out(engine)
    spec, (output,) = engine.inputs[0], engine.outputs
    shape = [1 if d is None else d for d in spec.shape]
    if any(d is None for d in spec.shape[1:]) or not spec.dtype.startswith("float"):
        raise InputError("cannot create a golden input", where=engine.path, found=_described([spec]))
    array = np.random.default_rng(seed).standard_normal(shape).astype(spec.dtype)
    loaded = open_engine(engine)
    try:
        result = loaded.infer({spec.name: array})[output.name]
    finally:
        loaded.close()
    if not np.isfinite(result).all():
        raise InputError("the output for random input is not finite", where=engine.path, found=output.name)
    return array, result


def golden_of(engines: Sequence[EngineFile]) -> tuple[Golden | None, str]:
    """The golden pair of the first engine that runs on this host; if none does, None and the reason."""
    reason = "no engine"
    for engine in engines:
        try:
            return golden_pair(engine), ""
        except PipelineError as error:
            reason = f"{error.what}{'' if error.found is None else f' ({error.found})'}"
    return None, reason


def golden_files(golden: Golden, engine: EngineFile, name: str, version: int) -> dict[str, bytes]:
    """Files for the version folder, by name: the two arrays, and their description with the tolerance.

    Raises:
        InputError: The arrays do not match the engine's input and output, or are not finite.
    """
    _require_one_in_and_out(engine)
    problems = []
    for array, spec in zip(golden, (*engine.inputs, *engine.outputs), strict=True):
        fits = len(array.shape) == len(spec.shape) and all(
            d in (None, n) for d, n in zip(spec.shape, array.shape, strict=True)
        )
        if not fits or array.dtype.name != spec.dtype:
            problems.append(f"{_described([spec])} does not match {array.dtype.name} {array.shape}")
        elif not np.isfinite(array).all():
            problems.append(f"{spec.name} is not finite")
    if problems:
        raise InputError(
            "the golden pair does not match the engine",
            where=engine.path,
            found="; ".join(problems),
            fix="build the engine again: its sidecar has the shapes that the graph had then",
        )
    description = {
        "model": name,
        "version": version,
        "input": engine.inputs[0].name,
        "output": engine.outputs[0].name,
        "tolerance": _TOLERANCES.get(engine.precision, _OTHER_TOLERANCE),
    }
    files = {
        "golden.json": (json.dumps(description, indent=2) + "\n").encode(),
        "input.npy": _npy(_as_served(golden[0], max_batch_size(engine))),
        "output.npy": _npy(_as_served(golden[1], max_batch_size(engine))),
    }
    return {f"{FOLDER}/{file}": data for file, data in files.items()}


def _require_one_in_and_out(engine: EngineFile) -> None:
    if (len(engine.inputs), len(engine.outputs)) != (1, 1):
        raise InputError(
            "a golden pair needs exactly one input and one output",
            where=engine.path,
            found=_described((*engine.inputs, *engine.outputs)),
        )


def _as_served(array: npt.NDArray[Any], max_batch: int) -> npt.NDArray[Any]:
    """An array in the shape that clients see: Triton has one number, or one for each image, as a vector of one element."""
    return array[..., None] if array.ndim == min(max_batch, 1) else array


def _described(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{s.name} {s.dtype} {s.shape}" for s in specs)


def _npy(array: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
