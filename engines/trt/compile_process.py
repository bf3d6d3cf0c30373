"""The process that compiles one ONNX file with TensorRT-RTX; `compile.py` starts it.

The library may end its process, which must not end maskplan. The request is read from stdin as JSON and the answer written
to stdout; what the library itself prints goes to stderr.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskplan.engines.sidecar import write_sidecar
from maskplan.engines.trt.build import BuildError, build_trt, compile_plan
from maskplan.engines.trt.layers import count_layers, parse_engine_layers
from maskplan.engines.trt.log_capture import TrtLogCapture
from maskplan.engines.trt.messages import readable, way_out
from maskplan.engines.trt.options import TrtOptions
from maskplan.engines.trt.parse import ParseError
from maskplan.engines.trt.versions import import_library
from maskplan.exporters.lazy_load import load_lazily
from maskplan.exporters.subgraphs import model_nodes
from maskplan.pipeline.core.artifacts import EngineFile, OnnxModel, Profile
from maskplan.pipeline.core.choices import INT8, TENSORRT_RTX
from maskplan.pipeline.core.compilation import CompiledProfile, CompileProblem, CompileResult, CompileWarning
from maskplan.pipeline.core.errors import HostError, InputError, PipelineError
from maskplan.pipeline.core.serialization import decode, encode, parse_json

# A check inside the compiler of versions before 1.7.
_FLOAT_ONLY = re.compile(r"CHECK\(dtype == myelinTypeFloat \|\| dtype == myelinTypeHalf")
_SIZES = "see which sizes reach this node: those that the graph fixes must fit the batches of the profile"
_ERRORS = {kind.__name__: kind for kind in (HostError, InputError)}


@dataclass(frozen=True)
class CompileRequest:
    """What to compile.

    Attributes:
        onnx: The graph; its inputs are those that need a profile, and only their batch is dynamic.
        profiles: Ranges of batch sizes; none where all shapes are fixed.
        sparse_weights: Set the sparse flag.
        options: The other options.
        out: Where to write the plan and its sidecar; None keeps neither.
    """

    onnx: OnnxModel
    profiles: tuple[Profile, ...]
    sparse_weights: bool
    options: TrtOptions
    out: Path | None


@dataclass(frozen=True)
class Compiled:
    """The compiler's verdict, and the engine's record where a plan was written."""

    result: CompileResult
    engine: EngineFile | None


def compile_here(request: CompileRequest) -> Compiled:
    """Compile in this process.

    Raises:
        HostError: The library is missing, does not start, or lacks memory.
        InputError: It does not take a profile or an option.
    """
    trt = import_library(TENSORRT_RTX)
    log_capture = TrtLogCapture(trt)
    problems: tuple[CompileProblem, ...] = ()
    engine, sha256, size_bytes = None, None, None
    started = time.perf_counter()
    what = (request.onnx, request.profiles, request.sparse_weights, request.options)
    try:
        if request.out is None:
            plan = compile_plan(trt, *what, log_capture)
            sha256, size_bytes = hashlib.sha256(plan).hexdigest(), len(plan)
        else:
            engine = build_trt(*what, request.out, backend=TENSORRT_RTX, log_capture=log_capture)
            write_sidecar(engine)
            sha256, size_bytes = engine.sha256, engine.bytes
    except ParseError as error:
        problems = tuple(CompileProblem(p.node or None, p.op or None, p.reason, p.fix) for p in error.problems)
        problems = problems or (CompileProblem(None, None, str(error.found), str(error.fix)),)
    except BuildError as error:
        problems = (build_problem(request.onnx, str(error.found)),)
    build_s = round(time.perf_counter() - started, 3) if engine is None else engine.build_s
    profiles, unread = _layers(request.profiles, log_capture) if not problems else ((), ())
    result = CompileResult(
        onnx=request.onnx.path.name,
        onnx_sha256=request.onnx.sha256,
        precision=request.onnx.precision,
        compiler=log_capture.library.name,
        version=str(trt.__version__),
        accepted=not problems,
        problems=problems,
        profiles=profiles,
        warnings=_counted(map(readable, log_capture.warnings)),
        unread_lines=unread,
        path=request.out if engine is not None else None,
        sha256=sha256,
        size_bytes=size_bytes,
        build_s=build_s,
    )
    return Compiled(result, engine)


def build_problem(onnx_model: OnnxModel, found: str) -> CompileProblem:
    """Why a graph that was parsed is not compiled: the compiler's messages, and the node that they name."""
    if onnx_model.precision == INT8 and _FLOAT_ONLY.search(found):
        fix = "pip install --upgrade tensorrt-rtx-cu13: 1.7 takes INT8; or compile the FP16 file"
        return CompileProblem(None, None, "this version compiles no convolutions in INT8", fix)
    ops = {node.name: node.op_type for node in model_nodes(load_lazily(onnx_model.path)) if node.name}
    # The longest name: one may be part of another.
    named = [name for name in ops if re.search(rf"(?<![\w./]){re.escape(name)}(?![\w/])(?!\.\w)", found)]
    node = max(named, key=len, default=None)
    reason = readable(found)
    if node is None:
        return CompileProblem(None, None, reason, way_out(reason, "give the file and this message to NVIDIA"))
    return CompileProblem(node, ops[node], reason, way_out(reason, _SIZES))


def _layers(
    profiles: tuple[Profile, ...], log_capture: TrtLogCapture
) -> tuple[tuple[CompiledProfile, ...], tuple[str, ...]]:
    """The layers by profile, and what could not be read."""
    names: list[str | None] = [str(profile) for profile in profiles]
    names = names or [None]
    if not log_capture.layer_lists:
        return (), ("the compiler's log has no list of layers",)
    found = parse_engine_layers(log_capture.layer_lists[0], len(names))
    counted = (count_layers(name, layers) for name, layers in zip(names, found.profiles, strict=True))
    return tuple(counted), found.unread


def _counted(warnings: Iterable[str]) -> tuple[CompileWarning, ...]:
    counts = Counter(warnings)
    return tuple(CompileWarning(text, count) for text, count in counts.items())


def answer_of(work: Compiled | PipelineError) -> dict[str, Any]:
    """The JSON form of what came of a request."""
    if isinstance(work, Compiled):
        return {"compiled": encode(work)}
    texts = {name: None if value is None else str(value) for name, value in vars(work).items()}
    return {"error": {"kind": type(work).__name__, **{n: texts[n] for n in ("what", "where", "found", "fix")}}}


def read_answer(data: bytes) -> Compiled:
    """The inverse of `answer_of`.

    Raises:
        PipelineError: The one that was answered.
        ValueError: Not an answer, or cut short.
    """
    values = parse_json(data)
    if "compiled" in values:
        return decode(Compiled, values["compiled"])
    error = values["error"]
    kind = _ERRORS.get(error.pop("kind"), InputError)
    raise kind(error["what"], where=error["where"], found=error["found"], fix=error["fix"])


def main() -> None:
    """Answer one request."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = decode(CompileRequest, parse_json(sys.stdin.buffer.read()))
    try:
        work: Compiled | PipelineError = compile_here(request)
    except PipelineError as error:
        work = error
    with answer:
        json.dump(answer_of(work), answer)


if __name__ == "__main__":
    main()
