"""Run a plan behind the Engine protocol: buffers and stream in the primary context, GPU time from events."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maskplan.engines.base import Arrays, CallTiming
from maskplan.engines.trt.cuda import Context
from maskplan.engines.trt.graph import Graph, capture
from maskplan.engines.trt.host import require_compatible_host
from maskplan.engines.trt.log_capture import TrtLogCapture
from maskplan.engines.trt.record import plan_mismatches
from maskplan.engines.trt.versions import LIBRARIES, construct, import_library
from maskplan.pipeline.core.artifacts import EngineFile, Profile, TensorSpec
from maskplan.pipeline.core.errors import HostError, InputError, PipelineError, listed
from maskplan.pipeline.core.files import read_bytes

_Shapes = tuple[tuple[int, ...], ...]
_NUMPY_TYPES = {"float64", "float32", "float16", "int8", "uint8", "int32", "int64", "bool"}


@dataclass
class _Batch:
    """Device and page-locked host buffers for one set of input shapes, and its CUDA graph."""

    profile: int
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    host_inputs: dict[str, npt.NDArray[Any]]
    host_outputs: dict[str, npt.NDArray[Any]]
    graph: Graph | None = None
    runs: int = 0


class TrtEngine:
    """A plan, deserialized after its library's version and its GPU were compared with this host.

    Args:
        engine: The record in the sidecar; the caller has verified the digest.
        graphs: Use CUDA graphs if cuda-python is installed.

    Raises:
        HostError: The library is not installed, there is no GPU, or its memory is insufficient.
        InputError: The plan was built with another version or for another GPU, has no weights, has tensors
            unsupported by NumPy, is damaged, or does not match its sidecar.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(self, engine: EngineFile, *, graphs: bool = True) -> None:
        _require_runnable(engine)
        require_compatible_host(engine)
        trt = import_library(engine.backend)
        self._record, self._graphs = engine, graphs
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self._log_capture = TrtLogCapture(trt)
        self._library = LIBRARIES[engine.backend]
        self._batches: dict[_Shapes, _Batch] = {}
        self._current: _Shapes | None = None
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self.last_timing: CallTiming | None = None
        self._cuda = Context()
        try:
            with self._cuda.active():
                self._load(trt)
        except BaseException:
            self.close()
            raise

    def _load(self, trt: Any) -> None:
        self._runtime = construct(trt.Runtime, self._log_capture)
        if self._record.version_compatible:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(read_bytes(self._record.path))
        if self._engine is None:
            raise self._failed(
                InputError(
                    f"{self._library.name} cannot load the plan",
                    where=self._record.path,
                    found=self._log_capture.reason(),
                    fix="rebuild it on this host's GPU",
                )
            )
        # Raised here, where only `self` refers to the plan: an error keeps the locals of its frames alive.
        problems = plan_mismatches(trt, self._engine, self._record)
        if problems:
            raise InputError(
                "the plan does not match its sidecar",
                where=self._record.path,
                found=listed(problems),
                fix="rebuild it, or import it with the ONNX file and profile of the trtexec build",
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise self._failed(
                HostError(
                    f"{self._library.name} failed to create an execution context for the plan",
                    where=self._record.path,
                    found=self._log_capture.reason(),
                    fix="see nvidia-smi",
                )
            )

    def _failed(self, otherwise: PipelineError) -> PipelineError:
        """The error to raise when TensorRT returned nothing: out of memory, or `otherwise`."""
        if not self._log_capture.is_out_of_memory():
            return otherwise
        return HostError(
            "insufficient GPU memory for the engine",
            where=self._record.path,
            found=self._log_capture.reason(),
            fix="free GPU memory, or rebuild with smaller batches",
        )

    def infer(self, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run once, in the profile tuned closest to the shapes; sets `last_timing`.

        Raises:
            InputError: The feeds do not match the plan's inputs, or no profile contains their shapes.
            HostError: The GPU reports an error.
        """
        started = time.perf_counter()
        shapes = _shapes_of(feeds, self.inputs, self._record.path)
        with self._cuda.active():
            memory = self._batches.get(shapes) or self._allocate(shapes)
            self._select(shapes, memory)
            for name, array in feeds.items():
                np.copyto(memory.host_inputs[name], array, casting="no")
            copied_in, ran, copied_out = self._run(memory)
            outputs = {name: array.copy() for name, array in memory.host_outputs.items()}
        self.last_timing = CallTiming(ran, copied_in, copied_out, 1000 * (time.perf_counter() - started))
        return outputs

    def _run(self, memory: _Batch) -> tuple[float, ...]:
        """Copy in, launch, copy out; returns their durations in ms. The events are freed while the context is current."""
        events = [self._cuda.record_event()]
        for name, array in memory.host_inputs.items():
            self._cuda.copy_in(memory.inputs[name], array)
        events.append(self._cuda.record_event())
        self._launch(memory)
        events.append(self._cuda.record_event())
        for name, array in memory.host_outputs.items():
            self._cuda.copy_out(array, memory.outputs[name])
        events.append(self._cuda.record_event())
        self._cuda.synchronize()
        return tuple(self._cuda.elapsed_ms(a, b) for a, b in pairwise(events))

    def close(self) -> None:
        """Release the engine and its memory."""
        with self._cuda.active():
            self._drop_graphs()
            self._batches.clear()
            self._context = None
            self._engine = None
            self._runtime = None
        self._cuda.close()

    def _allocate(self, given: _Shapes) -> _Batch:
        profile = _closest(self._record.profiles, given, self.inputs)
        self._set_shapes(given, profile)
        shapes = {}
        for spec in self.outputs:
            shapes[spec.name] = tuple(self._context.get_tensor_shape(spec.name))
            if any(d < 0 for d in shapes[spec.name]):
                raise InputError(
                    "an output's shape depends on the data",
                    where=f"{self._record.path}: {spec.name}",
                    found=shapes[spec.name],
                    fix="export a graph whose output shapes depend only on the batch",
                )
        memory = _Batch(
            profile,
            inputs={s.name: self._cuda.allocate(_bytes(g, s.dtype)) for s, g in zip(self.inputs, given, strict=True)},
            outputs={s.name: self._cuda.allocate(_bytes(shapes[s.name], s.dtype)) for s in self.outputs},
            host_inputs={s.name: self._cuda.pinned(g, s.dtype) for s, g in zip(self.inputs, given, strict=True)},
            host_outputs={s.name: self._cuda.pinned(shapes[s.name], s.dtype) for s in self.outputs},
        )
        self._batches[given] = memory
        return memory

    def _select(self, shapes: _Shapes, memory: _Batch) -> None:
        """Set these shapes and their addresses in the context, unless they are current."""
        if self._current == shapes:
            return
        self._set_shapes(shapes, memory.profile)
        for name, address in (memory.inputs | memory.outputs).items():
            if not self._context.set_tensor_address(name, int(address)):
                raise HostError(
                    f"{self._library.name} rejects a tensor address",
                    where=f"{self._record.path}: {name}",
                    found=self._log_capture.reason(),
                    fix="see nvidia-smi",
                )
        self._current = shapes

    def _set_shapes(self, shapes: _Shapes, profile: int) -> None:
        try:
            self._context.set_optimization_profile_async(profile, self._cuda.stream_handle)
        except RuntimeError as error:  # the bindings never return False
            raise HostError(
                f"{self._library.name} failed to change the profile",
                where=self._record.path,
                found=f"{error} {self._log_capture.reason()}",
                fix="see nvidia-smi",
            ) from error
        self._current = None
        self._drop_graphs()
        for spec, shape in zip(self.inputs, shapes, strict=True):
            if not self._context.set_input_shape(spec.name, shape):
                raise InputError(
                    f"{self._library.name} rejects an input shape",
                    where=f"{self._record.path}: {spec.name}",
                    found=f"{shape}; {self._log_capture.reason()}",
                    fix=f"the engine accepts {', '.join(map(str, self._record.profiles))}",
                )

    def _drop_graphs(self) -> None:
        """Destroy captured graphs: launching one after the context has changed is undefined."""
        for memory in self._batches.values():
            if memory.graph is not None:
                memory.graph.close()
            memory.graph, memory.runs = None, 0

    def _launch(self, memory: _Batch) -> None:
        """Run on the stream: without a graph the first time, as TensorRT requires before a capture, then with one."""
        if self._graphs and memory.runs == 1:
            memory.graph = capture(self._cuda.stream_handle, self._enqueue)
        memory.runs += 1
        if memory.graph is not None and memory.graph.launch():
            return
        if not self._enqueue():
            raise HostError(
                f"{self._library.name} failed to run the engine",
                where=self._record.path,
                found=self._log_capture.reason(),
                fix="see nvidia-smi",
            )

    def _enqueue(self) -> bool:
        return bool(self._context.execute_async_v3(self._cuda.stream_handle))


def _require_runnable(engine: EngineFile) -> None:
    if engine.strip_plan:
        raise InputError(
            "the plan contains no weights",
            where=engine.path,
            found="a stripped plan",
            fix="refit it with the weights of its ONNX file, or build it without --strip",
        )
    unsupported = [f"{s.name} {s.dtype}" for s in (*engine.inputs, *engine.outputs) if s.dtype not in _NUMPY_TYPES]
    if unsupported:
        raise InputError(
            "NumPy does not support the type of an input or output",
            where=engine.path,
            found=listed(unsupported),
            fix="export a graph with float32 or float16 inputs and outputs; inner tensors may have any type",
        )


def _shapes_of(feeds: Arrays, inputs: tuple[TensorSpec, ...], where: Path) -> _Shapes:
    """The shapes of the feeds, in the order of the inputs.

    Raises:
        InputError: The feeds do not match the inputs, or differ in batch size; the message lists every difference.
    """
    problems = [f"{name}, which is not an input" for name in feeds if name not in {s.name for s in inputs}]
    has_batch = any(spec.shape[:1] == (None,) for spec in inputs)
    # Beside an input with a dynamic batch, a fixed first axis is no batch.
    fixed = {spec.name for spec in inputs if has_batch and spec.shape[:1] != (None,)}
    batches = {int(array.shape[0]) for name, array in feeds.items() if array.ndim and name not in fixed}
    for spec in inputs:
        array = feeds.get(spec.name)
        sizes = ["batch", *("any" if d is None else str(d) for d in spec.shape[1:])] if spec.shape else []
        expected = f"{spec.dtype} ({', '.join(sizes)})"
        if array is None:
            problems.append(f"no {spec.name}, expected {expected}")
        elif array.dtype != spec.dtype or not _fits(array.shape, spec.shape):
            problems.append(f"{spec.name} {array.dtype} {array.shape}, expected {expected}")
    if len(batches) > 1:
        problems.append(f"batch sizes {' and '.join(map(str, sorted(batches)))} in one call")
    if problems:
        raise InputError(
            "the feeds do not match the engine's inputs",
            where=where,
            found=listed(problems),
            fix="pass one array per input, all with the same batch size",
        )
    return tuple(feeds[spec.name].shape for spec in inputs)


def _fits(shape: tuple[int, ...], declared: tuple[int | None, ...]) -> bool:
    """Whether a shape is one of an input; the first axis, a batch size, is left to the profiles."""
    return len(shape) == len(declared) and all(d in (None, s) for s, d in zip(shape[1:], declared[1:], strict=True))


def _closest(profiles: tuple[Profile, ...], shapes: _Shapes, inputs: tuple[TensorSpec, ...]) -> int:
    """The profile that contains the shapes and is tuned closest to them: by its batch, then by its sizes."""
    given = {spec.name: shape for spec, shape in zip(inputs, shapes, strict=True)}
    # Beside an input with a dynamic batch, a fixed first axis is no batch.
    batched = [given[spec.name] for spec in inputs if spec.shape[:1] == (None,)]
    batch = next((shape[0] for shape in batched or shapes if shape), 1)

    def contains(profile: Profile) -> bool:
        return profile.min <= batch <= profile.max and all(
            low <= size <= high
            for r in profile.shapes
            for low, size, high in zip(r.min, given[r.name], r.max, strict=True)
        )

    def distance(profile: Profile) -> tuple[int, float]:
        axes = [pair for r in profile.shapes for pair in zip(given[r.name][1:], r.opt[1:], strict=True)]
        return abs(profile.opt - batch), sum(abs(math.log(size / tuned)) for size, tuned in axes)

    fitting = [i for i, profile in enumerate(profiles) if contains(profile)]
    if not fitting:
        found = str(batch) if not any(p.shapes for p in profiles) else listed(f"{n} {s}" for n, s in given.items())
        raise InputError(
            "no profile contains the batch size" if found == str(batch) else "no profile contains the shapes",
            found=f"{found}; profiles {', '.join(map(str, profiles))}",
            fix="rebuild with a --profile that contains it",
        )
    return min(fitting, key=lambda i: distance(profiles[i]))


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize
