"""Triton's config.pbtxt for engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from maskplan.pipeline.core.artifacts import EngineFile, TensorSpec
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.triton.pbtxt import quoted

_TENSORRT = "tensorrt"
_PLATFORMS = {"onnxruntime": ("onnxruntime_onnx", "model.onnx"), _TENSORRT: ("tensorrt_plan", "model.plan")}
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


@dataclass(frozen=True)
class Serving:
    """How Triton runs a model.

    Attributes:
        queue_delay_us: Microseconds that a request may wait for others to share its batch.
        preferred_batches: Batch sizes that run as soon as they are reached; if empty, only the delay counts.
        cuda_graphs: Replay captured CUDA graphs; TensorRT only, where None means on.
        warmup: Run every profile's batch once on zeros while loading, so that no client waits for it.
        instances: Number of instances of the model on each GPU.
    """

    queue_delay_us: int = 1000
    preferred_batches: tuple[int, ...] = ()
    cuda_graphs: bool | None = None
    warmup: bool = True
    instances: int = 1

    def __post_init__(self) -> None:
        at_least(0, queue_delay_us=self.queue_delay_us)
        at_least(1, instances=self.instances)


def platform_of(engine: EngineFile) -> str:
    """Triton's platform name for an engine.

    Raises:
        InputError: Triton has no platform for its backend.
    """
    require_platform(engine.backend, engine.path)
    return _PLATFORMS[engine.backend][0]


def require_platform(backend: str, where: Path | None = None) -> None:
    """Raise unless Triton serves engines of this backend.

    Args:
        backend: The backend.
        where: The engine, if there already is one.

    Raises:
        InputError: It does not.
    """
    if backend not in _PLATFORMS:
        raise InputError(
            f"Triton has no backend for {backend}, so such an engine cannot be deployed",
            where=where,
            fix=f"build with --backend {' or '.join(_PLATFORMS)} to deploy",
        )


def model_files(engines: Sequence[EngineFile]) -> dict[str, EngineFile]:
    """File names in a version folder: `model.plan` for a single plan, else `model_8_0.plan` for each compute capability."""
    platform_of(engines[0])
    name = Path(_PLATFORMS[engines[0].backend][1])
    if len(engines) == 1:
        return {str(name): engines[0]}
    return {f"{name.stem}_{str(e.compute_capability).replace('.', '_')}{name.suffix}": e for e in engines}


def max_batch_size(engine: EngineFile) -> int:
    """The largest batch that Triton may form; 0 turns off batching.

    Triton splits the rows of every output among the requests of a batch, so each image must have one row in each.
    """
    tensors = (*engine.inputs, *engine.outputs)
    dynamic = engine.batched is not False and all(spec.shape and spec.shape[0] is None for spec in tensors)
    return max((p.max for p in engine.profiles), default=1) if dynamic else 0


def config_text(
    engines: Sequence[EngineFile],
    name: str,
    serving: Serving | None = None,
    *,
    versions: Sequence[int] = (1,),
    labels: str | None = None,
) -> str:
    """The config.pbtxt of engines that differ only in the GPU they are for.

    With `max_batch_size` above 0, Triton expects dims without the batch. The versions are listed explicitly, so that a new
    version folder is not served before the config names it.

    Args:
        engines: One, or several plans of one model.
        name: Name of the model in the repository.
        serving: How to run it.
        versions: Versions to serve.
        labels: File with the outputs' labels, in the model's folder.

    Raises:
        InputError: Triton lacks a data type, or the engine cannot be served with these options.
    """
    engine, serving = engines[0], serving or Serving()
    max_batch = max_batch_size(engine)
    _require_servable(engine, serving, max_batch)
    blocks = [
        f"name: {quoted(name)}",
        f"platform: {quoted(platform_of(engine))}",
        f"max_batch_size: {max_batch}",
        f"version_policy {{ specific {{ versions: [ {', '.join(map(str, versions))} ] }} }}",
        *(_tensor("input", spec, max_batch) for spec in engine.inputs),
        *(_tensor("output", spec, max_batch, labels) for spec in engine.outputs),
    ]
    if max_batch > 1:
        preferred = ", ".join(map(str, sorted(serving.preferred_batches)))
        sizes = f"preferred_batch_size: [ {preferred} ] " if preferred else ""
        blocks.append(f"dynamic_batching {{ {sizes}max_queue_delay_microseconds: {serving.queue_delay_us} }}")
    blocks.append(_instances(engine, serving, max_batch))
    if engine.backend == _TENSORRT and serving.cuda_graphs is not False:
        blocks.append("optimization { cuda { graphs: true } }")
    if len(engines) > 1:
        files = [_entry(str(e.compute_capability), quoted(file)) for file, e in model_files(engines).items()]
        blocks.append(f"cc_model_filenames [\n  {_joined(files)}\n]")
    # Warmup samples need fixed sizes.
    if serving.warmup and all(d is not None for spec in engine.inputs for d in _dims(spec, max_batch)):
        blocks.append(_warmups(engine, max_batch))
    return "\n".join(blocks) + "\n"


def _require_servable(engine: EngineFile, serving: Serving, max_batch: int) -> None:
    problems = []
    if engine.backend != _TENSORRT and serving.cuda_graphs:
        problems.append("CUDA graphs require a TensorRT plan: omit --cuda-graphs")
    wrong = [size for size in serving.preferred_batches if not 1 <= size <= max_batch]
    if wrong:
        sizes = f"from 1 to {max_batch}" if max_batch else "none, as the batch is fixed"
        problems.append(f"preferred batches {listed(wrong)}: the engine accepts {sizes}")
    if engine.backend == _TENSORRT:
        taken = {size for p in engine.profiles for size in range(p.min, p.max + 1)}
        refused = [size for size in range(1, max_batch + 1) if size not in taken]
        if refused:
            problems.append(f"Triton forms batches from 1 to {max_batch}, but no profile covers {listed(refused)}")
    tensors = (*engine.inputs, *engine.outputs)
    empty = [s.name for s in tensors if 0 in s.shape]
    if empty:
        problems.append(f"{listed(empty)}: a dimension is 0")
    scalars = [s.name for s in tensors if not s.shape]
    if engine.backend == _TENSORRT and scalars:
        problems.append(f"Triton passes no scalars to TensorRT: give {listed(scalars)} the shape [1] in the graph")
    unknown = [s for s in tensors if s.dtype not in _TRITON_TYPES]
    if unknown:
        problems.append(f"Triton does not support the data type of {listed(f'{s.name} {s.dtype}' for s in unknown)}")
    if problems:
        raise InputError(
            "Triton cannot serve the engine with these options",
            where=engine.path,
            found="; ".join(problems),
            fix="change these options, or rebuild with --profile 1:OPT:MAX and float inputs and outputs",
        )


def _dims(spec: TensorSpec, max_batch: int) -> tuple[int | None, ...]:
    """The dims of a tensor's config; Triton refuses empty ones, and has a scalar as a vector of one element."""
    return (spec.shape[1:] if max_batch else spec.shape) or (1,)


def _tensor(kind: str, spec: TensorSpec, max_batch: int, labels: str | None = None) -> str:
    lines = [f"name: {quoted(spec.name)}", *_kind(spec, max_batch)]
    if max_batch and len(spec.shape) == 1:
        # The graph has one number an image. Without batches Triton takes no empty reshape, and needs none for ONNX Runtime.
        lines.append("reshape { shape: [ ] }")
    if labels:
        lines.append(f"label_filename: {quoted(labels)}")
    inner = "\n".join(f"    {line}" for line in lines)
    return f"{kind} [\n  {{\n{inner}\n  }}\n]"


def _kind(spec: TensorSpec, max_batch: int) -> tuple[str, str]:
    dims = ", ".join(str(-1 if d is None else d) for d in _dims(spec, max_batch))
    return f"data_type: {_TRITON_TYPES[spec.dtype]}", f"dims: [ {dims} ]"


def _instances(engine: EngineFile, serving: Serving, max_batch: int) -> str:
    fields = [f"count: {serving.instances}"]
    if engine.backend == _TENSORRT:
        fields.append("kind: KIND_GPU")
        if len(engine.profiles) > 1 and any(None in spec.shape for spec in engine.inputs):
            # By default Triton uses the first profile only, which may be the one for single images.
            fields.append(f"profile: [ {', '.join(quoted(str(i)) for i in range(len(engine.profiles)))} ]")
    return f"instance_group [ {{ {' '.join(fields)} }} ]"


def _warmups(engine: EngineFile, max_batch: int) -> str:
    """Samples of zeros for each profile's optimal batch and the largest batch; a fixed batch is part of the dims."""
    sizes = sorted({max_batch, *(p.opt for p in engine.profiles)}) if max_batch else [1]
    samples = []
    for size in sizes:
        fields = [f"name: {quoted(f'batch of {size}')}", f"batch_size: {size}"]
        for spec in engine.inputs:
            zeros = " ".join((*_kind(spec, max_batch), "zero_data: true"))
            fields.append(f"inputs {_entry(spec.name, f'{{ {zeros} }}')}")
        samples.append("{\n    " + "\n    ".join(fields) + "\n  }")
    return f"model_warmup [\n  {_joined(samples)}\n]"


def _entry(key: str, value: str) -> str:
    return f"{{ key: {quoted(key)} value: {value} }}"


def _joined(items: Sequence[str]) -> str:
    return ",\n  ".join(items)
