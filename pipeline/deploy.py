"""The deploy stage: an engine into a Triton model repository. The version folder appears whole, then the config."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from engines.sidecar import read_engine, sidecar_path
from pipeline.artifacts import Deployment, EngineFile, TensorSpec
from pipeline.errors import InputError, host_error
from pipeline.files import TEMPORARY_SUFFIX, read_bytes, write_atomically

_PLATFORMS = {"onnxruntime": ("onnxruntime_onnx", "model.onnx"), "tensorrt": ("tensorrt_plan", "model.plan")}
_TRITON_TYPES = {
    "float64": "TYPE_FP64",
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int8": "TYPE_INT8",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "bool": "TYPE_BOOL",
}
_LABELS = "labels.txt"
_TENSOR_FIELDS = re.compile(r"(?:input|output) \[|\bname: \"[^\"]*\"|data_type: \w+|dims: \[[^\]]*\]")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class DeployOptions:
    """Where to deploy, and what to refuse.

    Attributes:
        repository: Triton's model repository.
        name: Of the model in it.
        allow_untrained: Deploy an engine of random weights, for timing.
    """

    repository: Path
    name: str
    allow_untrained: bool = False


def deploy(engine_path: Path, options: DeployOptions) -> Deployment:
    """Add an engine to a repository as the model's next version.

    Raises:
        InputError: The engine is untrained, not what its sidecar says, or its inputs and outputs differ from those that the
            repository serves under this name.
        HostError: The repository cannot be written.
    """
    engine = read_engine(engine_path)
    if engine.provenance is not None and not engine.provenance.trained and not options.allow_untrained:
        raise InputError(
            "the engine's weights are random",
            where=engine_path,
            found=engine.provenance.origin,
            fix="deploy a trained model, or pass --allow-untrained to serve it for timing",
        )
    if not _NAME.fullmatch(options.name):
        raise InputError(
            "not a name for a model in a repository",
            found=repr(options.name),
            fix="use letters, digits, '-', '_' and '.', and begin with a letter or digit",
        )
    platform, file_name = _PLATFORMS[engine.backend]
    folder = options.repository / options.name
    text = config_text(engine, options.name, platform)
    _require_same_io(folder / "config.pbtxt", text)
    version = 1 + max((int(p.name) for p in folder.glob("[1-9]*") if p.name.isdecimal()), default=0)
    staged = folder / f".{version}.{os.getpid()}{TEMPORARY_SUFFIX}"
    final = folder / str(version)
    is_new = not folder.exists()
    try:
        staged.mkdir(parents=True)
        write_atomically(staged / file_name, read_bytes(engine.path))
        write_atomically(staged / sidecar_path(Path(file_name)).name, read_bytes(sidecar_path(engine.path)))
        staged.rename(final)
    except OSError as error:
        raise host_error(error, where=folder) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if is_new and not final.exists():
            # A server that finds a model without a version does not start.
            with contextlib.suppress(OSError):
                folder.rmdir()
    files = [final / file_name, folder / "config.pbtxt"]
    if engine.provenance is not None and engine.provenance.labels:
        write_atomically(folder / _LABELS, ("\n".join(engine.provenance.labels) + "\n").encode())
        files.append(folder / _LABELS)
    write_atomically(folder / "config.pbtxt", text.encode())
    return Deployment(folder, version, platform, tuple(files))


def config_text(engine: EngineFile, name: str, platform: str) -> str:
    """The model's config.pbtxt; with `max_batch_size` above 0 its dims leave the batch out, as Triton wants."""
    dynamic = all(spec.shape and spec.shape[0] is None for spec in (*engine.inputs, *engine.outputs))
    max_batch = max(p.max for p in engine.profiles) if dynamic else 0
    labels = engine.provenance.labels if engine.provenance is not None else ()
    blocks = [f'name: "{name}"', f'platform: "{platform}"', f"max_batch_size: {max_batch}"]
    blocks += [_tensor("input", spec, max_batch) for spec in engine.inputs]
    blocks += [_tensor("output", spec, max_batch, _LABELS if labels else None) for spec in engine.outputs]
    if max_batch > 1:
        blocks.append("dynamic_batching { max_queue_delay_microseconds: 1000 }")
    return "\n".join(blocks) + "\n"


def _tensor(kind: str, spec: TensorSpec, max_batch: int, labels: str | None = None) -> str:
    if spec.dtype not in _TRITON_TYPES:
        raise InputError(
            "Triton has no such type",
            where=spec.name,
            found=spec.dtype,
            fix="export with float inputs and outputs",
        )
    dims = ", ".join(str(-1 if d is None else d) for d in (spec.shape[1:] if max_batch else spec.shape))
    lines = [f'name: "{spec.name}"', f"data_type: {_TRITON_TYPES[spec.dtype]}", f"dims: [ {dims} ]"]
    if labels:
        lines.append(f'label_filename: "{labels}"')
    inner = "\n".join(f"    {line}" for line in lines)
    return f"{kind} [\n  {{\n{inner}\n  }}\n]"


def _require_same_io(config: Path, text: str) -> None:
    if not config.is_file():
        return
    served = read_bytes(config).decode(errors="replace")

    def tensors(of: str) -> list[str]:
        """What clients depend on: names, types and dims, in order; `{`, `}` and other fields are left out."""
        return [re.sub(r"\s", "", found) for found in _TENSOR_FIELDS.findall(of[of.find("input [") :])]

    if tensors(served) != tensors(text):
        raise InputError(
            "the repository serves other inputs and outputs under this name",
            where=config,
            found="clients of the served version would break",
            fix="choose another --name",
        )
