"""Compile an ONNX file with TensorRT-RTX, on any machine and without a GPU: is it accepted, and what becomes of its layers?

It shows acceptance, types and fusions. It does not show sparse kernels, which the GPU that runs the plan chooses, nor speed,
nor what TensorRT itself would do.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from maskplan.engines.trt.compile_process import Compiled, CompileRequest, read_answer
from maskplan.engines.trt.compile_shapes import fix_shapes
from maskplan.engines.trt.options import TrtOptions
from maskplan.engines.trt.versions import LIBRARIES, is_installed
from maskplan.pipeline.core.artifacts import OnnxModel, Profile
from maskplan.pipeline.core.choices import TENSORRT_RTX
from maskplan.pipeline.core.compilation import CompileProblem, CompileResult
from maskplan.pipeline.core.errors import HostError, InputError
from maskplan.pipeline.core.serialization import encode

_LIBRARY = LIBRARIES[TENSORRT_RTX]
_DISTRIBUTIONS = ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx")
_COMMAND = (sys.executable, "-P", "-m", "maskplan.engines.trt.compile_process")
# Protobuf's limit for one message.
_MAX_BYTES = 2**31 - 1
_MAX_QUOTED_LINES = 3


def installed_version() -> str | None:
    """The installed version, without importing the library; None if it cannot be told."""
    for name in _DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def compile_onnx(
    onnx_model: OnnxModel,
    profiles: Sequence[Profile] = (),
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    sparse_weights: bool = True,
    options: TrtOptions | None = None,
    out: Path | None = None,
) -> Compiled:
    """Compile a file in a process of its own.

    A file that the compiler refuses, or that makes it crash, is a result: `accepted` is False, with the reason.

    Args:
        onnx_model: The graph.
        profiles: Ranges of batch sizes; see `fix_shapes` for the default.
        shapes: Whole shapes of inputs that are dynamic in more than the batch.
        sparse_weights: Set the sparse flag.
        options: The other options.
        out: Where to write the plan and its sidecar, for a graph with a batch as its only dynamic size; None keeps neither.

    Raises:
        HostError: The library is not installed, does not start, or lacks memory.
        InputError: The file is larger than its parser reads, or its shapes and the profiles do not go together.
    """
    if not is_installed(_LIBRARY.package):
        raise HostError(f"{_LIBRARY.name} is not installed", where=_LIBRARY.package, fix=_LIBRARY.how_to_install)
    if onnx_model.bytes > _MAX_BYTES:
        raise InputError(
            f"{_LIBRARY.name} cannot read the file",
            where=onnx_model.path,
            found=f"{onnx_model.bytes / 1e9:.1f} GB; its parser reads at most 2 GB",
            fix="store the weights beside the graph: onnx.save_model(..., save_as_external_data=True)",
        )
    fixed, chosen = (onnx_model, tuple(profiles)) if out is not None else fix_shapes(onnx_model, profiles, shapes or {})
    request = CompileRequest(
        onnx=replace(fixed, path=fixed.path.absolute()),
        profiles=chosen,
        sparse_weights=sparse_weights,
        options=options or TrtOptions(),
        out=None if out is None else out.absolute(),
    )
    code, answer, printed = _run(json.dumps(encode(request)).encode())
    if code == 0:
        return read_answer(answer)
    if code == -signal.SIGKILL:
        fix = "free memory, or compile with smaller batch sizes"
        raise HostError("the compiler was killed", where=onnx_model.path, found="probably out of memory", fix=fix)
    if code > 0 and "Traceback" in printed:
        raise RuntimeError(printed)  # ours
    return Compiled(_crashed(onnx_model, code, printed), None)


def _run(request: bytes) -> tuple[int, bytes, str]:
    """The exit code of the process, its answer, and what it printed."""
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(_COMMAND, stdin=pipe, stdout=pipe, stderr=pipe, env={**os.environ, **paths}) as process:
        try:
            answer, printed = process.communicate(request)
        except BaseException:
            process.kill()
            raise
    return process.returncode, answer, printed.decode(errors="replace")


def _crashed(onnx_model: OnnxModel, code: int, printed: str) -> CompileResult:
    ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    last = "; ".join(line.strip() for line in printed.strip().splitlines()[-_MAX_QUOTED_LINES:])
    reason = f"the compiler crashed ({ended})" + (f": {last}" if last else "")
    fix = "cut the graph in two to find the node that it crashes on, and write that node with other operators"
    return CompileResult(
        onnx=onnx_model.path.name,
        onnx_sha256=onnx_model.sha256,
        precision=onnx_model.precision,
        compiler=_LIBRARY.name,
        version=installed_version() or "unknown",
        accepted=False,
        problems=(CompileProblem(None, None, reason, fix),),
        profiles=(),
        warnings=(),
        unread_lines=(),
        path=None,
        sha256=None,
        size_bytes=None,
        build_s=0.0,
    )
