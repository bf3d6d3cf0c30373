"""Golden inputs and outputs next to a deployed engine, which `serve-check` compares a server's output with."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from maskplan.engines.batch_runner import BatchRunner
from maskplan.engines.build import open_engine
from maskplan.pipeline.core.artifacts import EngineFile, TensorSpec
from maskplan.pipeline.core.errors import InputError, PipelineError, listed
from maskplan.pipeline.data.samples import noise_samples
from maskplan.pipeline.triton.config import max_batch_size

FOLDER = "golden"
# Shares of the largest output. The server's GPU or its release of ONNX Runtime may choose other kernels.
_TOLERANCES = {"fp32": 1e-3, "fp16": 5e-2}
_OTHER_TOLERANCE = 1e-1

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Golden:
    """What an engine was given and what it returned: arrays by the names of its inputs and outputs."""

    feeds: Mapping[str, Array]
    outputs: Mapping[str, Array]


def golden_pair(engine: EngineFile, seed: int = 0, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Golden:
    """Run an engine once on a seeded input: one sample, or as many as the graph's fixed batch.

    Args:
        engine: The engine.
        seed: Of the noise.
        shapes: With the batch, of inputs of which more than the batch is dynamic and that no profile of the engine knows.

    Raises:
        InputError: The engine cannot be loaded on this host, the size of an input is not known, or an output is not finite.
        HostError: Its runtime is not installed.
    """
    known = {r.name: r.opt for r in (engine.profiles[0].shapes if engine.profiles else ())} | dict(shapes or {})
    sized = [replace(s, shape=(s.shape[0], *known[s.name][1:])) if s.name in known else s for s in engine.inputs]
    if any(None in spec.shape[1:] for spec in sized):
        raise InputError("the size of a golden input is not known", where=engine.path, found=_described(sized))
    noise = noise_samples(sized, 1, None, engine.path.name, seed)
    with BatchRunner(open_engine(engine), engine.path.name) as runner:
        # With a batch a sample's rows are one sample; without, the row is the whole input.
        feeds = next(iter(noise.batches(1)))
        outputs = runner.run(feeds, whole=True)
    if broken := [name for name, array in outputs.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]:
        raise InputError("the output for random input is not finite", where=engine.path, found=listed(broken))
    return Golden(feeds, outputs)


def golden_of(
    engines: Sequence[EngineFile], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[Golden | None, str]:
    """The golden pair of the first engine that runs on this host; if none does, None and the reason."""
    reason = "no engine"
    for engine in engines:
        try:
            return golden_pair(engine, shapes=shapes), ""
        except PipelineError as error:
            reason = f"{error.what}{'' if error.found is None else f' ({error.found})'}"
    return None, reason


def golden_files(golden: Golden, engine: EngineFile, name: str, version: int) -> dict[str, bytes]:
    """Files for the version folder, by name: the arrays, and their description with the tolerance.

    Raises:
        InputError: The arrays do not match the engine's inputs and outputs, or are not finite.
    """
    problems = []
    for arrays, specs in ((golden.feeds, engine.inputs), (golden.outputs, engine.outputs)):
        if arrays.keys() != {spec.name for spec in specs}:
            problems.append(f"{_described(specs)} does not match {listed(sorted(arrays))}")
            continue
        for spec in specs:
            array = arrays[spec.name]
            if array.dtype.name != spec.dtype or not _fits(array, spec):
                problems.append(f"{_described([spec])} does not match {array.dtype.name} {array.shape}")
            elif array.dtype.kind == "f" and not np.isfinite(array).all():
                problems.append(f"{spec.name} is not finite")
    if problems:
        raise InputError(
            "the golden pair does not match the engine",
            where=engine.path,
            found="; ".join(problems),
            fix="build the engine again: its sidecar has the shapes that the graph had then",
        )
    max_batch = max_batch_size(engine)
    named = {"input": golden.feeds, "output": golden.outputs}
    description = {
        "model": name,
        "version": version,
        **{kind: _one_or_all(list(arrays)) for kind, arrays in named.items()},
        "tolerance": _TOLERANCES.get(engine.precision, _OTHER_TOLERANCE),
    }
    files = {"golden.json": (json.dumps(description, indent=2) + "\n").encode()}
    for kind, arrays in named.items():
        for file, array in zip(array_files(kind, len(arrays)), arrays.values(), strict=True):
            files[file] = _npy(_as_served(array, max_batch))
    return {f"{FOLDER}/{file}": data for file, data in files.items()}


def array_files(kind: str, count: int) -> list[str]:
    """Names of the files of inputs or outputs, in their order: `input.npy`, or `input.0.npy`, `input.1.npy`, ..."""
    return [f"{kind}.npy"] if count == 1 else [f"{kind}.{index}.npy" for index in range(count)]


def _one_or_all(names: list[str]) -> str | list[str]:
    return names[0] if len(names) == 1 else names


def _fits(array: Array, spec: TensorSpec) -> bool:
    """Whether an array has a declared shape; one that is not declared is that of the run."""
    if not spec.shape and array.ndim:
        return True
    return array.ndim == len(spec.shape) and all(d in (None, n) for d, n in zip(spec.shape, array.shape, strict=True))


def _as_served(array: Array, max_batch: int) -> Array:
    """An array in the shape that clients see: Triton has one number, or one for each image, as a vector of one element."""
    return array[..., None] if array.ndim == min(max_batch, 1) else array


def _described(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{s.name} {s.dtype} {s.shape}" for s in specs)


def _npy(array: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
